"""Copies of headers: what tells about tensors is there, their numbers are not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wanx.checkpoints.sparse_copy import sparse_copy
from wanx.checkpoints.weights import open_files
from wanx.errors import CorruptInputError, WanxError

LARGE = 300_000


class Counted(io.RawIOBase):
    """A file that counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position, self.count = data, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = {0: 0, 1: self.position, 2: len(self.data)}[whence] + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self.data[self.position : self.position + len(buffer)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        self.count += len(piece)
        return len(piece)


def copied(path: Path, folder: Path) -> tuple[Path, int]:
    """Copy a file's header; returns the copy and how many bytes were read."""
    folder.mkdir(exist_ok=True)
    remote = Counted(path.read_bytes())
    reader = io.BufferedReader(remote, 1024)
    sparse_copy(reader, path.stat().st_size, folder / path.name)
    return folder / path.name, remote.count


def of_safetensors(path: Path) -> None:
    layer = {"weight": torch.ones(LARGE // 1000, 1000).to(torch.float8_e4m3fn)}
    layer["weight_scale"] = torch.tensor(0.5)
    text = json.dumps({"format": "float8_e4m3fn"}).encode()
    layer["comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file({f"a.{name}": tensor for name, tensor in layer.items()}, path)


def of_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("texts", ["word"] * 1000)
    writer.add_tensor("a", np.ones((LARGE // 100, 100), "f4"))
    writer.add_tensor("b", np.ones(3, "f4"))
    for act in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{act}_to_file")()
    writer.close()


def of_pytorch(path: Path) -> None:
    tensors = {f"layer.{n}": torch.randn(LARGE // 100 + n, 7) for n in range(9)}
    torch.save(tensors | {"half": torch.ones(5).half(), "none": torch.ones(0, 3)}, path)


WRITERS = {".safetensors": of_safetensors, ".gguf": of_gguf, ".pth": of_pytorch}


@pytest.mark.parametrize("suffix", WRITERS)
def test_it_reads_as_the_file_does(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    WRITERS[suffix](path)
    copy, count = copied(path, tmp_path / "copy")
    assert count < path.stat().st_size / 5
    assert copy.stat().st_size == path.stat().st_size
    whole, alone = (
        {
            name: (source.dtype, source.storage, source.shape, source.nbytes, source.stored_bytes)
            for name, source in open_files([file])[0].items()
        }
        for file in (path, copy)
    )
    assert whole == alone


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("left", [0, 5, 100, 0.5, 0.999])
def test_cut_files_are_refused_as_they_would_be(suffix: str, left: float, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    WRITERS[suffix](path)
    data = path.read_bytes()
    path.write_bytes(data[: int(left if left >= 1 else left * len(data))])
    with pytest.raises(CorruptInputError):
        open_files([path])

    def both() -> None:
        open_files([copied(path, tmp_path / "copy")[0]])

    with pytest.raises(CorruptInputError):
        both()


def json_file(path: Path, words: int) -> None:
    path.write_text(json.dumps({"weight_map": dict.fromkeys(map(str, range(words)), "x")}))


@pytest.mark.parametrize(
    ("name", "write", "whole"),
    [
        ("config.json", lambda path: json_file(path, 10), True),
        ("w.safetensors.index.json", lambda path: json_file(path, 200_000), True),
        ("tokenizer.json", lambda path: json_file(path, 200_000), False),
        ("spiece.model", lambda path: path.write_bytes(b"x" * (2 << 20)), False),
    ],
)
def test_configs_are_whole_and_tokenizers_are_not(
    name: str, write: Callable[[Path], None], whole: bool, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    copy, _ = copied(path, tmp_path / "copy")
    assert (copy.read_bytes() == path.read_bytes()) is whole
    assert copy.stat().st_size == path.stat().st_size


def test_an_entry_that_is_no_tensor_and_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pth"
    of_pytorch(path)
    monkeypatch.setattr("wanx.checkpoints.sparse_copy._MAX_ENTRY", 100)
    with pytest.raises(WanxError, match=r"data.pkl has \d+ bytes"):
        copied(path, tmp_path / "copy")
