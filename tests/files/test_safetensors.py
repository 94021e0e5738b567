"""The reader against the safetensors library on whole and damaged files; the writer against it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from wanx.config.number_formats import BY_SAFETENSORS
from wanx.errors import CorruptInputError, WanxError
from wanx.files.safetensors import SafetensorsWriter, read_header

TORCH_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}


def file_bytes(header: object, data: bytes = b"", tail: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text + tail)) + text + tail + data


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


ONE = {"a": entry(0, 8)}
WHOLE = {
    "plain": file_bytes(ONE, bytes(8)),
    "no tensors": file_bytes({}),
    "padded header": file_bytes(ONE, bytes(8), tail=b" " * 57),
    "metadata": file_bytes({"__metadata__": {"format": "pt"}, **ONE}, bytes(8)),
    "null metadata": file_bytes({"__metadata__": None, **ONE}, bytes(8)),
    "out of order": file_bytes({"b": entry(8, 12), "a": entry(0, 8)}, bytes(12)),
    "empty tensor between": file_bytes(
        {"b": entry(8, 12), "e": entry(8, 8, [0, 3]), "a": entry(0, 8)}, bytes(12)
    ),
    "scalar": file_bytes({"s": entry(0, 4, [])}, bytes(4)),
    "foreign field": file_bytes({"a": {**entry(0, 8), "note": 1}}, bytes(8)),
    "unicode name": file_bytes({"ü\n": entry(0, 8)}, bytes(8)),
}
DUPLICATE = b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)).encode(),) * 2)
# name: (bytes, words of our message, whether the library refuses it too)
DAMAGED = {
    "empty file": (b"", "too few", True),
    "seven bytes": (bytes(7), "too few", True),
    "truncated header": (WHOLE["plain"][:20], "header claims", True),
    "truncated data": (WHOLE["plain"][:-1], "truncated", True),
    "padded data": (WHOLE["plain"] + b"\0", "padded", True),
    "header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "above the limit", True),
    "header above the limit": (struct.pack("<Q", 100_000_001) + b"{}", "above the limit", True),
    "header past the end": (struct.pack("<Q", 99) + b"{}", "the file has 10", True),
    "not JSON": (file_bytes(b'{"a":'), "JSON", True),
    "zero header": (struct.pack("<Q", 0), "JSON", True),
    "JSON list": (file_bytes(b"[]"), "JSON list", True),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "JSON", True),
    "trailing NUL": (file_bytes(ONE, bytes(8), tail=b"\0"), "JSON", True),
    "deep nesting": (file_bytes(b'{"a":' + b"[" * 99_999 + b"]" * 99_999 + b"}"), "JSON", True),
    "lone surrogate": (file_bytes(b'{"\\ud800":1}'), "JSON", True),
    "huge integer": (file_bytes(b'{"a":' + b"9" * 5000 + b"}"), "5000 digits", True),
    "duplicate key": (file_bytes(DUPLICATE, bytes(8)), "'a' appears twice", False),
    "duplicate field": (
        file_bytes(
            b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
        ),
        "'dtype' appears twice",
        True,
    ),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__", True),
    "entry is a number": (file_bytes({"a": 1}), "malformed", True),
    "no dtype": (file_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "malf", True),
    "fractional shape": (file_bytes({"a": entry(0, 8, [2.0])}, bytes(8)), "malformed", True),
    "boolean shape": (file_bytes({"a": entry(0, 4, [True])}, bytes(4)), "malformed", True),
    "negative shape": (file_bytes({"a": entry(0, 8, [-2, -1])}, bytes(8)), "malformed", True),
    "three offsets": (
        file_bytes({"a": {**entry(0, 8), "data_offsets": [0, 8, 8]}}, bytes(8)),
        "malformed",
        True,
    ),
    "negative offset": (file_bytes({"a": entry(-8, 0)}, bytes(8)), "malformed", True),
    "unknown dtype": (file_bytes({"a": entry(0, 8, dtype="F33")}, bytes(8)), "'F33'", True),
    "four-bit dtype": (file_bytes({"a": entry(0, 1, [2], "F4")}, bytes(1)), "'F4'", False),
    "shape too small": (file_bytes({"a": entry(0, 8, [1])}, bytes(8)), "do not fill", True),
    "shape too large": (file_bytes({"a": entry(0, 8, [3])}, bytes(8)), "do not fill", True),
    "backward range": (file_bytes({"a": entry(8, 0, [2])}, bytes(8)), "do not fill", True),
    "overflow": (
        file_bytes({"a": entry(0, 0, [1 << 62, 1 << 62, 0])}),
        "do not fill",
        True,
    ),
    "wrapping shape": (file_bytes({"a": entry(0, 0, [1 << 62, 4])}), "do not fill", True),
    "overlap": (file_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps", True),
    "same range": (file_bytes({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps", True),
    "gap": (file_bytes({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "gap", True),
    "gap at the start": (file_bytes({"a": entry(4, 12)}, bytes(12)), "gap", True),
    "range past the end": (file_bytes({"a": entry(0, 80)}, bytes(8)), "truncated", True),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
        True,
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_accepts_what_the_library_accepts(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE[case])
    known = dict(safetensors.deserialize(WHOLE[case]))
    header = read_header(path)
    assert header.size == len(WHOLE[case])
    assert {n: (r.dtype, list(r.shape), r.nbytes) for n, r in header.entries.items()} == {
        n: (t["dtype"], t["shape"], len(t["data"])) for n, t in known.items()
    }


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.fault("cut or padded weights", "hostile weights header", "repeated key")
def test_refuses_damage_in_one_line(case: str, tmp_path: Path) -> None:
    data, words, library_refuses = DAMAGED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptInputError) as caught:
        read_header(path)
    message = str(caught.value)
    assert caught.value.exit_code == 5
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600
    if library_refuses:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(data)
    else:
        safetensors.deserialize(data)


@pytest.mark.fault("cut or padded weights")
def test_every_byte_cut_off_or_added_is_noticed(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int8)}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    assert read_header(tmp_path / "whole").entries.keys() == {"w", "b"}
    damaged = tmp_path / "damaged"
    for cut in range(len(data)):
        damaged.write_bytes(data[:cut])
        with pytest.raises(CorruptInputError):
            read_header(damaged)
    damaged.write_bytes(data + b"\0")
    with pytest.raises(CorruptInputError, match="padded"):
        read_header(damaged)


def test_references_point_at_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "f": torch.randn(3, 5),
        "h": torch.randn(7).to(torch.bfloat16),
        "b": torch.randint(-9, 9, (3,), dtype=torch.int8),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    data = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        ref = header.entries[name]
        expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert data[ref.offset : ref.offset + ref.nbytes] == expected
        assert (ref.name, ref.shape, ref.file) == (name, tuple(tensor.shape), path)


def test_long_hostile_names_are_cut_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_bytes({"n" * 1_000_000: 1}))
    with pytest.raises(CorruptInputError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 600


def test_a_shape_of_many_sides_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_bytes({"a": entry(0, 8, [1 << 40] * 500_000)}, bytes(8)))
    with pytest.raises(CorruptInputError, match="do not fill"):
        read_header(path)


def test_missing_folder_pipe_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CorruptInputError, match="is missing"):
        read_header(tmp_path / "none")
    with pytest.raises(CorruptInputError, match="not a regular file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptInputError, match="not a regular file"):
        read_header(tmp_path / "pipe")
    with pytest.raises(WanxError, match="cannot read"):
        read_header(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_written_files_load_equal(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    raw = torch.randint(0, 2 if dtype == "BOOL" else 120, (BY_SAFETENSORS[dtype].nbytes(210),))
    data = raw.to(torch.uint8).numpy().tobytes()
    shapes = [("one", (2, 3, 7)), ("two", (168,)), ("none", (0, 4))]
    with SafetensorsWriter(path, [(n, dtype, s) for n, s in shapes], {"k": "v"}) as writer:
        for begin in range(0, len(data), 97):
            writer.write(data[begin : begin + 97])
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_header(path) == writer.header
    loaded = load_file(path)
    split = BY_SAFETENSORS[dtype].nbytes(42)
    for name, shape, part in (("one", (2, 3, 7), data[:split]), ("two", (168,), data[split:])):
        expected = torch.frombuffer(bytearray(part), dtype=torch.uint8).view(TORCH_TYPES[dtype])
        assert loaded[name].dtype == TORCH_TYPES[dtype]
        assert loaded[name].shape == shape
        assert torch.equal(loaded[name].view(torch.uint8).flatten(), expected.view(torch.uint8))
    assert loaded["none"].shape == (0, 4)


def test_mixed_types_and_reused_chunk(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "f": torch.randn(300, 1000),
        "h": torch.randn(300, 999).to(torch.bfloat16),
        "scale": torch.tensor(0.5, dtype=torch.float16),
        "q": torch.randint(-128, 128, (1001,), dtype=torch.int8),
    }
    plan = [("f", "F32"), ("h", "BF16"), ("scale", "F16"), ("q", "I8")]
    chunk = bytearray(70_001)
    with SafetensorsWriter(path, [(n, d, tuple(tensors[n].shape)) for n, d in plan]) as writer:
        for name, _ in plan:
            data = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            for begin in range(0, len(data), len(chunk)):
                part = data[begin : begin + len(chunk)]
                chunk[: len(part)] = part
                writer.write(memoryview(chunk)[: len(part)])
                chunk[:] = b"\xee" * len(chunk)  # the writer must be done with it by now
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(ref.offset % 64 == 0 for ref in writer.header.entries.values() if ref.name == "f")


def test_accepts_arrays_and_counts_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    array = np.arange(12, dtype="<f4").reshape(3, 4)
    with SafetensorsWriter(path, [("a", "F32", (3, 4))]) as writer:
        writer.write(array.data)
    assert torch.equal(load_file(path)["a"], torch.from_numpy(array))


def test_wrong_totals_fail_and_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(WanxError, match="came"), SafetensorsWriter(path, [("a", "F32", (2,))]) as w:
        w.write(bytes(7))
    assert not path.exists()
    one = [("a", "F32", (2,))]
    with pytest.raises(WanxError, match="more bytes"), SafetensorsWriter(path, one) as writer:
        writer.write(bytes(9))
    assert not path.exists()


def test_an_exception_removes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with (
        pytest.raises(ZeroDivisionError),
        SafetensorsWriter(path, [("a", "F32", (2,))]) as writer,
    ):
        writer.write(bytes(8 // (1 - path.exists())))
    assert not path.exists()


def test_never_writes_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(WanxError, match="exists"):
        SafetensorsWriter(path, [])
    assert path.read_bytes() == b"mine"
    with pytest.raises(WanxError, match="No such file"):
        SafetensorsWriter(tmp_path / "none" / "x", [])


def test_misaligned_or_repeated_tensors_are_programming_errors(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="misaligned"):
        SafetensorsWriter(tmp_path / "x", [("q", "I8", (3,)), ("f", "F32", (1,))])
    with pytest.raises(AssertionError, match="twice"):
        SafetensorsWriter(tmp_path / "x", [("q", "I8", (3,)), ("q", "I8", (3,))])
    assert not (tmp_path / "x").exists()


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # /dev/full fails every write with ENOSPC, as a full disk does
    path = tmp_path / "x.safetensors"
    opened = Path.open

    def open_full(self: Path, *args: object, **kwargs: object) -> object:
        return opened(Path("/dev/full"), "wb", buffering=0) if self == path else opened(self)

    path.touch()
    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(WanxError) as caught:
        SafetensorsWriter(path, [("a", "F32", (1000,))])
    monkeypatch.undo()
    assert "the disk is full" in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert not path.exists()


def test_failure_in_the_middle_is_one_line(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    code = f"""
import resource, signal, sys
from pathlib import Path
from wanx.errors import WanxError
from wanx.files.safetensors import SafetensorsWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {limit}))
path = Path(sys.argv[1])
try:
    with SafetensorsWriter(path, [("a", "F32", (50_000,))]) as writer:
        for _ in range(20):
            writer.write(bytes(10_000))
except WanxError as error:
    print(path.exists(), error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("False cannot write")
    assert "after 100000 of 200" in run.stdout
    assert os.strerror(errno.EFBIG) in run.stdout
    assert run.stdout.count("\n") == 1


def test_imports_only_the_standard_library() -> None:
    code = (
        "import sys, wanx.files.safetensors; "
        "print([m for m in ('torch', 'numpy', 'safetensors', 'pydantic') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
