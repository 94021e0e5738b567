"""The tokenizer against sentencepiece, where only its model is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from wanx.checkpoints.sentencepiece_model import parse_sentencepiece
from wanx.checkpoints.tensors.gguf_file import read_gguf
from wanx.checkpoints.tensors.source import SafetensorsTensor
from wanx.checkpoints.tokenizer_source import (
    GGUFTokenizer,
    TensorTokenizer,
    TokenizerFile,
    write_tokenizer,
)
from wanx.errors import CorruptInputError, WanxError
from wanx.files.safetensors import read_header

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
    write_tokenizer(TokenizerFile(path=model), tmp_path / "tokenizer.json")
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*LINES, "", "  two  spaces ", "zzz unseen ü", "\ufb01ne \uff21"]:
        assert ours.encode(text).ids == [*theirs.encode(text), 1]


def test_a_damaged_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(CorruptInputError, match=r"spiece.model cannot be converted") as caught:
        write_tokenizer(TokenizerFile(path=tmp_path / "spiece.model"), tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tokenizer.json").exists()


def test_models_in_tensors_and_in_gguf_files(model: Path, tmp_path: Path) -> None:
    """As ComfyUI's files and GGUF files of umT5 bring them."""
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    path = tmp_path / "encoder.safetensors"
    data = torch.from_numpy(np.frombuffer(model.read_bytes(), np.uint8).copy())
    save_file({"spiece_model": data, "other": torch.zeros(2)}, path)
    tensor = SafetensorsTensor.from_ref(read_header(path).entries["spiece_model"])
    write_tokenizer(TensorTokenizer(path=path, tensor=tensor), tmp_path / "one.json")

    found = parse_sentencepiece(model.read_bytes(), "model")
    kinds = [3 if i in found.control else 2 if i == 2 else 1 for i in range(len(found.pieces))]
    writer = gguf.GGUFWriter(tmp_path / "encoder.gguf", "t5encoder")
    writer.add_token_list([piece for piece, _ in found.pieces])
    writer.add_token_scores([score for _, score in found.pieces])
    writer.add_token_types(kinds)
    writer.add_precompiled_charsmap(found.charsmap)
    writer.add_unk_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_add_space_prefix(True)
    writer.add_tensor("other", np.zeros(2, np.float32))
    for act in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{act}_to_file")()
    writer.close()
    file = read_gguf(tmp_path / "encoder.gguf")
    source = GGUFTokenizer(path=tmp_path / "encoder.gguf", file=file)
    write_tokenizer(source, tmp_path / "two.json")
    for text in [*LINES, "", "  two  spaces ", "zzz unseen ü", "\ufb01ne \uff21"]:
        expected = [*theirs.encode(text), 1]
        for name in ("one", "two"):
            ours = Tokenizer.from_file(str(tmp_path / f"{name}.json"))
            assert ours.encode(text).ids == expected


def test_a_gguf_file_without_scores(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "encoder.gguf", "t5encoder")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("other", np.zeros(2, np.float32))
    for act in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{act}_to_file")()
    writer.close()
    file = read_gguf(tmp_path / "encoder.gguf")
    with pytest.raises(CorruptInputError, match=r"lacks tokens or scores, or they are dam"):
        GGUFTokenizer(path=tmp_path / "encoder.gguf", file=file).to_json()


def test_a_tokenizer_is_copied_byte_for_byte(tmp_path: Path) -> None:
    text = json.dumps({"model": {"vocab": [["ü", 0.0]]}}, indent=3)
    (tmp_path / "tokenizer.json").write_text(text)
    write_tokenizer(TokenizerFile(path=tmp_path / "tokenizer.json"), tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text() == text


def test_a_byte_order_mark_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'\xef\xbb\xbf{"model": 1}')
    write_tokenizer(TokenizerFile(path=tmp_path / "tokenizer.json"), tmp_path / "copy.json")
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
        write_tokenizer(TokenizerFile(path=tmp_path / "tokenizer.json"), tmp_path / "copy.json")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(WanxError, match="cannot write /dev/full: No space left"):
        write_tokenizer(TokenizerFile(path=tmp_path / "tokenizer.json"), Path("/dev/full"))
