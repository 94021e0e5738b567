"""Golden tokens of a bundle: a text and the token ids that its tokenizer gave at the export."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from wanx.bundle.manifest import TOKENIZER
from wanx.bundle.reader import Bundle
from wanx.errors import CorruptInputError, GateError
from wanx.files.input_file import read_json_object
from wanx.runtime.text import PromptTokenizer

GOLDEN_TOKENS = "golden/tokens.json"
# Words, marks and digits of many scripts, upper case, blanks and a character that few models know.
PROBE = (
    "A red circle, moving right at 25% speed: naïve café; 一只橘猫在雪地里奔跑，低质量. "
    "Кошка бежит! قطة حمراء ねこ 고양이 ไทย 🐱 (((very)))  well-lit_scene #4 ﷽"
)
_MAX_IDS = 4096


def write_golden_tokens(folder: Path, vocabulary: int, source: Path) -> None:
    """Encode the probe with a new bundle's tokenizer, and write text and ids into the bundle.

    Args:
        folder: of the bundle, which has its tokenizer.
        vocabulary: ids that the text encoder knows.
        source: file that the tokenizer was made from, for errors.

    Raises:
        CorruptInputError: the tokenizer cannot encode, or not for this text encoder.
    """
    tokenizer = folder / TOKENIZER
    try:
        ids = _encode(tokenizer, PROBE, vocabulary)
    except CorruptInputError as error:
        raise CorruptInputError(str(error).replace(str(tokenizer), str(source))) from None
    path = folder / GOLDEN_TOKENS
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"text": PROBE, "ids": ids}), encoding="utf-8")


def check_golden_tokens(bundle: Bundle) -> None:
    """Encode the golden text again; a bundle without one is encoded the probe.

    Raises:
        CorruptInputError: the tokenizer cannot encode, or there is no text and ids in the file.
        GateError: the ids are others than at the export.
    """
    vocabulary = bundle.manifest.config.text_encoder.vocab_size
    with bundle.names_in_errors():
        golden: dict[str, Any] = {"text": PROBE, "ids": None}
        if GOLDEN_TOKENS in bundle.manifest.files:
            path = bundle.held(GOLDEN_TOKENS)
            golden = read_json_object(path)
            if not _is_golden(golden):
                raise CorruptInputError(
                    f"{path} holds no text and its ids; export the bundle again"
                )
        ids = _encode(bundle.held(bundle.tokenizer_path), golden["text"], vocabulary)
    if golden["ids"] not in (None, ids):
        different = sum(a != b for a, b in zip(ids, golden["ids"], strict=False))
        different += abs(len(ids) - len(golden["ids"]))
        exported_with = bundle.manifest.provenance.tools.get("tokenizers")
        remedy = f"pip install tokenizers=={exported_with}, or " if exported_with else ""
        raise GateError(
            f"the tokenizer gives {different} other token ids than at the export ({len(ids)} for "
            f"{len(golden['ids'])}), with tokenizers {version('tokenizers')}; {remedy}export the "
            "bundle again"
        )


def _encode(path: Path, text: str, vocabulary: int) -> list[int]:
    tokenizer = PromptTokenizer(path)
    ids, mask = tokenizer.encode(text)
    used = [int(token) for token in np.asarray(ids)[mask == 1]]
    if max(used) >= vocabulary:
        raise CorruptInputError(
            f"{path} gives token id {max(used)}, and the text encoder knows {vocabulary}; get the "
            "tokenizer that belongs to the checkpoint"
        )
    return used


def _is_golden(golden: dict[str, Any]) -> bool:
    text, ids = golden.get("text"), golden.get("ids")
    return (
        isinstance(text, str)
        and len(text) <= _MAX_IDS
        and isinstance(ids, list)
        and len(ids) <= _MAX_IDS
        and all(type(token) is int for token in ids)
    )
