"""Pickles that build far more than their size says, and honest ones."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wanx.checkpoints.tensors import pickle_scan
from wanx.checkpoints.tensors.pickle_file import read_pickle
from wanx.checkpoints.tensors.pickle_scan import PickleError, scan_pickle
from wanx.errors import CorruptInputError

START, END = b"\x80\x02", b"."


def archive(path: Path, data: bytes, extra: tuple[tuple[str, bytes], ...] = ()) -> Path:
    """A .pth file around a pickle, with one storage of 64 bytes."""
    with zipfile.ZipFile(path, "w") as file:
        parts = [("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little")]
        for name, content in (*parts, ("data/0", bytes(64)), *extra):
            file.writestr(name if "/" in name and name[0] != "d" else f"m/{name}", content)
    return path


def doubling(levels: int) -> bytes:
    """A tuple of two of the last tuple, over and over: 2^levels leaves."""
    pairs = (b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(1, levels + 1))
    return b"K\x01" + b"".join(pairs)


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    b"K\x00K\x10\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
BOMBS: dict[str, tuple[bytes, str]] = {
    "a key of 2^40 leaves": (START + b"}" + doubling(40) + b"K\x01s" + END, "tuple of over"),
    "a value of 2^40 leaves": (START + b"}K\x01" + doubling(40) + b"s" + END, "tuple of over"),
    "a key of a million tuples in each other": (
        START + b"}K\x01" + b"\x85" * 1_000_000 + b"K\x01s" + END, "tuple of over",
    ),
    "a wide tuple": (START + b"}(" + b"K\x01" * 2000 + b"tK\x01s" + END, "tuple of over"),
    "bytes of 2 GB": (
        START + b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR" + END, "run 'builtins.bytearray'",
    ),
    "a storage of 2 GB": (
        START + b"ctorch\nFloatStorage\n(J\xff\xff\xff\x7ftR" + END, "needs 'torch.FloatStorage'",
    ),
    "a storage by NEWOBJ": (
        START + b"ctorch\nFloatStorage\n(J\xff\xff\xff\x7ft\x81" + END, "opcode NEWOBJ",
    ),
    "a tensor of 2 GB": (
        START + b"ctorch\nFloatTensor\n(J\xff\xff\xff\x7ftR" + END, "needs 'torch.FloatTensor'",
    ),
    "a set": (START + b"cbuiltins\nset\n(]tR" + END, "would run 'builtins.set'"),
    "a counter": (START + b"ccollections\nCounter\n(]tR" + END, "would run 'collections.Counter'"),
    "a call of a value": (START + b"K\x01)R" + END, "calls a value"),
    "many calls": (
        START + b"ccollections\nOrderedDict\nq\x01]" + b"(h\x01)Re" * 150_000 + END, "calls",
    ),
    "many opcodes": (START + b"]" + b"N" * 2_000_000 + END, "opcodes"),
    "opcodes of newer pickles": (pickle.dumps({"a": (1, 2)}, protocol=5), "opcode FRAME"),
    "nothing": (b"", "damaged"),
    "no end": (START + b"}", "damaged"),
    "an empty stack": (START + b"\x86" + END, "damaged"),
    "a mark below": (START + b"K\x01(\x85" + END, "damaged"),
    "no mark": (START + b"t" + END, "damaged"),
    "an empty memo": (START + b"h\x01" + END, "damaged"),
    "text": (b"not a pickle", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.fault("pickle that builds too much")
def test_bombs_are_refused_at_once(bomb: str, tmp_path: Path) -> None:
    data, words = BOMBS[bomb]
    path = archive(tmp_path / "m.pth", data)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(CorruptInputError) as caught:
        read_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peak < 50e6 + 20 * len(data)
    assert time.monotonic() - start < 60  # seconds; unbounded they never end


def test_a_pickle_that_is_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pickle_scan, "MAX_PICKLE_BYTES", 1 << 20)
    with pytest.raises(PickleError, match="over 1 MB"):
        scan_pickle(bytes((1 << 20) + 1))


def test_a_tensor_written_by_hand(tmp_path: Path) -> None:
    data = START + b"}X\x01\x00\x00\x00w" + TENSOR + b"s" + END
    (source,) = read_pickle(archive(tmp_path / "m.pth", data)).values()
    assert (source.name, source.shape, source.dtype) == ("w", (16,), "F32")


def test_an_entry_that_claims_to_be_longer_than_the_file(tmp_path: Path) -> None:
    data = START + b"}X\x01\x00\x00\x00w" + TENSOR + b"s" + END
    path = archive(tmp_path / "m.pth", data)
    whole = path.read_bytes()
    at = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"m/data.pkl"))
    huge = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
    path.write_bytes(whole[: at + 20] + huge + whole[at + 28 :])
    with pytest.raises(CorruptInputError, match="not a whole PyTorch archive"):
        read_pickle(path)


@pytest.mark.parametrize("name", ["M/DATA.PKL", "m/Data.pkl", "n/data.pkl", "m/data.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.fault("pickle that runs code")
def test_there_is_one_pickle_to_find(name: str, tmp_path: Path) -> None:
    """PyTorch finds an entry in any case, so a second one could be what it reads."""
    data = START + b"}X\x01\x00\x00\x00w" + TENSOR + b"s" + END
    path = archive(tmp_path / "m.pth", data, extra=((name, BOMBS["a set"][0]),))
    with pytest.raises(CorruptInputError, match="not a whole PyTorch archive"):
        read_pickle(path)


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        self.register_buffer("scale", torch.ones(2, dtype=torch.float16))


HONEST: dict[str, Callable[[], Any]] = {
    "a dictionary": lambda: {"w": torch.ones(2, 3), "v": torch.zeros(0)},
    "a state with metadata": lambda: Module().state_dict(),
    "parameters": lambda: dict(Module().named_parameters()),
    "all widths": lambda: {
        str(dtype): torch.ones(2, dtype=dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    },
    "one storage, several views": lambda: dict(enumerate_views(torch.arange(12.0))),
    "parameters with attributes": lambda: {"w": tagged(torch.nn.Parameter(torch.ones(2)))},
    "an ordered dictionary": lambda: collections.OrderedDict(w=torch.ones(1)),
    "many tensors": lambda: {f"blocks.{i}.weight": torch.ones(1) for i in range(5000)},
}


def tagged(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    parameter.is_expert = True
    return parameter


def enumerate_views(whole: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return [("all", whole), ("part", whole[2:5]), ("grid", whole.reshape(3, 4)[:, 1])]


@pytest.mark.parametrize("kind", HONEST)
@pytest.mark.parametrize("protocol", [2, 3])
def test_what_torch_saves_passes(kind: str, protocol: int, tmp_path: Path) -> None:
    state = HONEST[kind]()
    torch.save(state, tmp_path / "m.pth", pickle_protocol=protocol)
    sources = read_pickle(tmp_path / "m.pth")
    assert list(sources) == list(state)
    for name, source in sources.items():
        expected = state[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert b"".join(bytes(part) for part in source.iter_bytes()) == expected.tobytes()


def test_other_types_are_named_as_types(tmp_path: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.int64, torch.complex64, torch.uint16, torch.bool):
        torch.save({"w": torch.zeros(2, dtype=dtype)}, tmp_path / "m.pth")
        with pytest.raises(CorruptInputError, match=f"tensor 'w' is {dtype}"):
            read_pickle(tmp_path / "m.pth")


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_mutations_of_an_honest_pickle_raise_nothing_else() -> None:
    buffer = io.BytesIO()
    torch.save(Module().state_dict(), buffer)
    data = zipfile.ZipFile(buffer).read("archive/data.pkl")
    scan_pickle(data)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(int(generator.integers(1, 4))):
            at = int(generator.integers(len(changed)))
            match generator.integers(3):
                case 0:
                    changed[at] = int(generator.integers(256))
                case 1:
                    del changed[at]
                case _:
                    changed[at:at] = struct.pack("<I", int(generator.integers(2**32)))
        try:
            scan_pickle(bytes(changed))
        except PickleError:
            refused += 1
    assert refused > 1000
