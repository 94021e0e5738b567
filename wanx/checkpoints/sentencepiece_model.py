"""SentencePiece models as the tokenizer.json that the runtime reads.

Fields are those of ``sentencepiece_model.proto``, github.com/google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from wanx.errors import CorruptInputError
from wanx.files.protobuf import fields

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # of SentencePiece
_MODEL_TYPE, _UNK_ID, _EOS_ID = 3, 40, 42  # of TrainerSpec
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES = 2, 3, 4  # of NormalizerSpec
_UNIGRAM, _CONTROL = 1, 3
_SPACE = "▁"


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """A unigram model.

    Attributes:
        pieces: with their scores, by id.
        unk_id: of what is in no piece.
        eos_id: of the end of a text.
        charsmap: table of normalisations, empty for none.
        dummy_prefix: a text begins with a space.
        trims_spaces: spaces at the end, and all of several but one, are removed.
        control: ids that no text becomes.
    """

    pieces: Sequence[tuple[str, float]]
    unk_id: int = 0
    eos_id: int = 2
    charsmap: bytes = b""
    dummy_prefix: bool = True
    trims_spaces: bool = True
    control: Sequence[int] = field(default=())

    def to_json(self) -> bytes:
        """Convert to a tokenizer.json, with the end behind each text.

        Raises:
            ValueError: pieces, ids or the table are none.
        """
        tokenizer = Tokenizer(Unigram(list(self.pieces), unk_id=self.unk_id, byte_fallback=False))
        tokenizer.add_special_tokens(
            [AddedToken(self.pieces[i][0], normalized=False) for i in self.control]
        )
        steps: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.trims_spaces:
            steps.append(normalizers.Strip(left=False, right=True))
            steps.append(normalizers.Replace(Regex(" {2,}"), _SPACE))
        tokenizer.normalizer = normalizers.Sequence(steps)
        scheme = "always" if self.dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme=scheme
        )
        end = self.pieces[self.eos_id][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, self.eos_id)]
        )
        text: str = tokenizer.to_str()
        return text.encode()


def parse_sentencepiece(data: bytes | bytearray | memoryview, name: str) -> SentencePieceModel:
    """Read a serialised model.

    Args:
        data: its bytes.
        name: of where they are, for messages.

    Raises:
        CorruptInputError: they are no unigram model.
    """
    damaged = f"{name} cannot be converted"
    pieces: list[tuple[str, float]] = []
    control: list[int] = []
    facts: dict[tuple[int, int], int | memoryview] = {}
    try:
        for number, _, message in fields(memoryview(data), damaged):
            if number not in (_PIECES, _TRAINER, _NORMALIZER) or isinstance(message, int):
                continue
            if number != _PIECES:
                for key, _, value in fields(message, damaged):
                    facts[number, key] = value
                continue
            piece, score, kind = "", 0.0, 1
            for key, _, value in fields(message, damaged):
                if key == _PIECE and isinstance(value, memoryview):
                    piece = str(value, "utf-8")
                elif key == _SCORE and isinstance(value, memoryview):
                    (score,) = struct.unpack("<f", value)
                elif key == _TYPE and isinstance(value, int):
                    kind = value
            if kind == _CONTROL:
                control.append(len(pieces))
            pieces.append((piece, score))
    except (UnicodeDecodeError, struct.error) as error:
        raise CorruptInputError(f"{damaged}: {error}") from None
    numbers = {key: value for key, value in facts.items() if isinstance(value, int)}
    kind = numbers.get((_TRAINER, _MODEL_TYPE), _UNIGRAM)
    if kind != _UNIGRAM or not pieces:
        raise CorruptInputError(
            f"{damaged}: it has {len(pieces)} pieces of model type {kind}, and Wan2.1's is a "
            "unigram model"
        )
    charsmap = facts.get((_NORMALIZER, _CHARSMAP), b"")
    return SentencePieceModel(
        pieces=pieces,
        unk_id=numbers.get((_TRAINER, _UNK_ID), 0),
        eos_id=numbers.get((_TRAINER, _EOS_ID), 2),
        charsmap=b"" if isinstance(charsmap, int) else bytes(charsmap),
        dummy_prefix=bool(numbers.get((_NORMALIZER, _DUMMY_PREFIX), 1)),
        trims_spaces=bool(numbers.get((_NORMALIZER, _EXTRA_SPACES), 1)),
        control=control,
    )
