"""The tokenizer against sentencepiece, where only its model is at hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from wanx.checkpoints.tokenizer_file import write_tokenizer
from wanx.errors import CorruptInputError, EnvironmentMismatchError, WanxError

LINES = ["a red circle moving right", "the Green square goes left", "Ünïcode, 红色 up & down!"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("umt5-xxl")
    (folder / "lines.txt").write_text("\n".join(LINES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "spiece"), vocab_size=45,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return folder / "spiece.model"


def test_converted_model_splits_as_sentencepiece_does(model: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    write_tokenizer(model, tmp_path / "tokenizer.json")
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*LINES, "", "  two  spaces ", "zzz unseen ü", "\ufb01ne \uff21"]:
        assert ours.encode(text).ids == [*theirs.encode(text), 1]


def test_a_damaged_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(CorruptInputError, match=r"spiece.model cannot be converted") as caught:
        write_tokenizer(tmp_path / "spiece.model", tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tokenizer.json").exists()


def test_without_transformers_the_message_names_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError(name)
        return found(name, package)

    (tmp_path / "spiece.model").write_bytes(b"model")
    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(EnvironmentMismatchError, match=r"download tokenizer\.json .*pip install"):
        write_tokenizer(tmp_path / "spiece.model", tmp_path / "tokenizer.json")


def test_a_tokenizer_is_copied_byte_for_byte(tmp_path: Path) -> None:
    text = json.dumps({"model": {"vocab": [["ü", 0.0]]}}, indent=3)
    (tmp_path / "tokenizer.json").write_text(text)
    write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text() == text


def test_a_byte_order_mark_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'\xef\xbb\xbf{"model": 1}')
    write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == b'{"model": 1}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "no tokenizer model"),
        ("{", "JSON"),
        ("version https://git-lfs.github.com/spec/", "lfs"),
    ],
)
def test_damaged_tokenizers(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CorruptInputError, match=words):
        write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "copy.json")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(WanxError, match="cannot write /dev/full: No space left"):
        write_tokenizer(tmp_path / "tokenizer.json", Path("/dev/full"))
