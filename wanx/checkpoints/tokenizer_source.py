"""Tokenizers of checkpoints, each as the tokenizer.json that the runtime reads."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanx.checkpoints.sentencepiece_model import SentencePieceModel, parse_sentencepiece
from wanx.checkpoints.tensors.gguf_file import GGUFFile
from wanx.checkpoints.tensors.source import TensorSource
from wanx.errors import CorruptInputError, WanxError
from wanx.files.input_file import open_input, read_json_object

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")  # in a folder, the better one first


@dataclass(frozen=True, kw_only=True)
class TokenizerSource(ABC):
    """A tokenizer, wherever it is.

    Attributes:
        path: the file.
    """

    path: Path

    @abstractmethod
    def to_json(self) -> bytes:
        """Convert it.

        Raises:
            CorruptInputError: it is damaged.
        """

    def _converted(self, model: SentencePieceModel) -> bytes:
        try:
            return model.to_json()
        except Exception as error:  # tokenizers raises whatever a damaged model makes it
            raise CorruptInputError(
                f"the tokenizer in {self.path} cannot be converted ({type(error).__name__}); give "
                "tokenizer.json of google/umt5-xxl with --tokenizer"
            ) from None


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(TokenizerSource):
    """A file: ``tokenizer.json``, or a SentencePiece model."""

    def to_json(self) -> bytes:
        """Read it, or convert the model."""
        if self.path.suffix != ".json":
            with open_input(self.path) as file:
                return self._converted(parse_sentencepiece(file.read(), str(self.path)))
        if "model" not in read_json_object(self.path):
            raise CorruptInputError(f"{self.path} has no tokenizer model; download it again")
        with open_input(self.path) as file:
            return file.read().removeprefix(codecs.BOM_UTF8)  # tokenizers refuses it


@dataclass(frozen=True, kw_only=True)
class TensorTokenizer(TokenizerSource):
    """A SentencePiece model in a tensor beside the weights, as ComfyUI's files have it."""

    tensor: TensorSource

    def to_json(self) -> bytes:
        """Convert the model."""
        data = b"".join(bytes(piece) for piece in self.tensor.iter_bytes())
        name = f"{self.tensor.name!r} of {self.path}"
        return self._converted(parse_sentencepiece(data, name))


@dataclass(frozen=True, kw_only=True)
class GGUFTokenizer(TokenizerSource):
    """A SentencePiece model in the metadata of a GGUF file."""

    file: GGUFFile

    def to_json(self) -> bytes:
        """Convert the model."""

        def value(key: str) -> Any:
            return self.file.fields.get(f"tokenizer.ggml.{key}")

        try:
            tokens, scores = _listed(value("tokens")), _listed(value("scores"))
            spaces, trims = value("add_space_prefix"), value("remove_extra_whitespaces")
            model = SentencePieceModel(
                pieces=list(zip(map(str, tokens), map(float, scores), strict=True)),
                unk_id=int(value("unknown_token_id") or 0),
                eos_id=int(value("eos_token_id") or 1),
                charsmap=bytes(_listed(value("precompiled_charsmap"))),
                dummy_prefix=spaces is None or bool(spaces),
                trims_spaces=trims is None or bool(trims),
                control=[i for i, kind in enumerate(_listed(value("token_type"))) if kind == 3],
            )
        except (TypeError, ValueError):
            model = SentencePieceModel(pieces=())
        if not model.pieces:
            raise CorruptInputError(
                f"the tokenizer in {self.path} lacks tokens or scores, or they are damaged; give "
                "tokenizer.json of google/umt5-xxl with --tokenizer"
            )
        return self._converted(model)


def _listed(values: Any) -> list[Any]:
    return [] if values is None else list(values)


def find_tokenizer(path: Path) -> TokenizerFile:
    """A tokenizer by its file, or by the folder that it is in.

    Raises:
        CorruptInputError: there is none.
    """
    if path.is_dir():
        candidates = [path / name for name in TOKENIZER_FILES]
        path = next((file for file in candidates if file.exists()), candidates[-1])
    open_input(path).close()
    return TokenizerFile(path=path)


def write_tokenizer(source: TokenizerSource, destination: Path) -> None:
    """Write ``tokenizer.json``.

    Args:
        source: of the checkpoint.
        destination: file to write.

    Raises:
        CorruptInputError: the source is damaged.
        WanxError: the destination cannot be written.
    """
    text = source.to_json()
    try:
        destination.write_bytes(text)
    except OSError as error:
        raise WanxError(
            f"cannot write {destination}: {error.strerror}; check the disk and the permissions"
        ) from None
