"""The tokenizer of a checkpoint, as the tokenizer.json that the runtime reads."""

from __future__ import annotations

import codecs
import importlib
from pathlib import Path

from wanx.errors import CorruptInputError, EnvironmentMismatchError, WanxError
from wanx.files.input_file import open_input, read_json_object


def write_tokenizer(source: Path, destination: Path) -> None:
    """Write ``tokenizer.json``, converting a SentencePiece model where only that exists.

    Args:
        source: ``tokenizer.json`` or ``spiece.model``, as ``Checkpoint.tokenizer`` names it.
        destination: file to write.

    Raises:
        CorruptInputError: the source is damaged.
        EnvironmentMismatchError: a conversion is needed and transformers is not installed.
        WanxError: the destination cannot be written.
    """
    if source.name == "spiece.model":
        text = _convert_sentencepiece(source)
    else:
        if "model" not in read_json_object(source):
            raise CorruptInputError(f"{source} has no tokenizer model; download it again")
        with open_input(source) as file:
            text = file.read().removeprefix(codecs.BOM_UTF8)  # tokenizers refuses it
    try:
        destination.write_bytes(text)
    except OSError as error:
        raise WanxError(
            f"cannot write {destination}: {error.strerror}; check the disk and the permissions"
        ) from None


def _convert_sentencepiece(source: Path) -> bytes:
    open_input(source).close()
    try:
        transformers = importlib.import_module("transformers")
        tokenizer = transformers.T5TokenizerFast.from_pretrained(
            source.parent, local_files_only=True
        )
        text: str = tokenizer.backend_tokenizer.to_str()
    except ImportError:  # of transformers, or of what it reads the model with
        raise EnvironmentMismatchError(
            f"{source.parent} has no tokenizer.json, and converting {source.name} needs more "
            "packages; download tokenizer.json from google/umt5-xxl beside it, or run "
            "`pip install transformers sentencepiece protobuf`"
        ) from None
    except Exception as error:  # the packages raise whatever a damaged model makes them
        raise CorruptInputError(
            f"{source} cannot be converted ({type(error).__name__}); download tokenizer.json from "
            "google/umt5-xxl beside it"
        ) from None
    return text.encode()
