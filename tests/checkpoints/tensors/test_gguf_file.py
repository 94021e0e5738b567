"""GGUF files against the package gguf, bit for bit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from wanx.checkpoints.tensors import gguf_file
from wanx.checkpoints.tensors.gguf_file import GGUFTensor, read_gguf
from wanx.checkpoints.weights import open_files
from wanx.errors import CorruptInputError, EnvironmentMismatchError, UsageError

# Every type that files of Wan use; ComfyUI-GGUF, tools/lcpp.patch.
KINDS = [
    *("BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
    *("IQ4_NL", "IQ4_XS"),
]


def write(path: Path, tensors: dict[str, tuple[Any, Kind | None]], arch: str = "wan") -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    for act in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{act}_to_file")()
    writer.close()
    return path


def blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random blocks whose scales are ordinary numbers, whatever their layout."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    found = np.empty((0, size), np.uint8)
    while len(found) < rows * columns // numbers:
        drawn = generator.integers(0, 256, (1 << 14, size), np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(drawn, kind)
        good = np.isfinite(values).all(1) & (np.abs(values).max(1) < 1e4)
        found = np.concatenate([found, drawn[good]])
    return found[: rows * columns // numbers].reshape(rows, columns // numbers * size)


def numbers(source: Any, dtype: str, chunk: int) -> np.ndarray[Any, Any]:
    data = b"".join(bytes(piece) for piece in source.iter_converted(dtype, chunk))
    kind = {"F32": np.float32, "F16": np.float16}[dtype]
    return np.frombuffer(data, kind).reshape(source.shape)


@pytest.mark.parametrize("chunk", [64, 1 << 20])
@pytest.mark.parametrize("name", KINDS)
def test_numbers_are_those_of_the_package(name: str, chunk: int, tmp_path: Path) -> None:
    kind = Kind[name]
    data = blocks(kind, 5, 512)
    path = write(tmp_path / "w.gguf", {"a.weight": (data, kind), "n": (np.ones(3, "f4"), None)})
    found, files = open_files([path])
    assert files == (path,)
    source = found["a.weight"]
    assert source.shape == (5, 512)
    expected = gguf.quants.dequantize(data, kind)
    np.testing.assert_array_equal(numbers(source, "F32", chunk), expected)
    np.testing.assert_array_equal(numbers(source, "F16", chunk), expected.astype(np.float16))
    if name != "BF16":
        assert isinstance(source, GGUFTensor)
        assert (source.storage, source.dtype, source.stored_bytes) == ("BF16", "F32", data.nbytes)
    whole = b"".join(bytes(piece) for piece in source.iter_bytes(chunk))
    assert len(whole) == source.nbytes
    np.testing.assert_array_equal(numbers(found["n"], "F32", chunk), np.ones(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_tensors_keep_their_type(dtype: Any, tmp_path: Path) -> None:
    data = np.random.default_rng(0).standard_normal((3, 2, 1, 2, 2)).astype(dtype)
    (source,) = open_files([write(tmp_path / "w.gguf", {"a": (data, None)})])[0].values()
    assert source.shape == data.shape
    assert source.storage == source.dtype == {"float32": "F32", "float16": "F16"}[data.dtype.name]
    np.testing.assert_array_equal(numbers(source, source.dtype, 64), data)


def test_a_file_is_known_by_its_beginning(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", {"a": (np.ones(4, "f4"), None)}, "t5encoder")
    assert open_files([path])[0].keys() == {"a"}
    assert read_gguf(path).fields["general.architecture"] == "t5encoder"


@pytest.mark.parametrize("left", [4, 30, 100, 0.5, 0.99])
@pytest.mark.fault("cut or damaged GGUF")
def test_truncated_files(left: float, tmp_path: Path) -> None:
    data = blocks(Kind.Q8_0, 64, 512)
    path = write(tmp_path / "w.gguf", {"a.weight": (data, Kind.Q8_0)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left if left >= 1 else left * len(whole))])
    with pytest.raises(CorruptInputError, match="truncated or damaged GGUF") as caught:
        open_files([path])
    assert "\n" not in str(caught.value)


@pytest.mark.fault("GGUF type that nothing widens")
def test_a_type_that_nobody_knows(tmp_path: Path) -> None:
    path = write(tmp_path / "w.gguf", {"aaaa": (blocks(Kind.Q8_0, 1, 256), Kind.Q8_0)})
    data = bytearray(path.read_bytes())
    place = data.index(b"aaaa") + 4 + 4 + 16
    assert data[place : place + 4] == int(Kind.Q8_0).to_bytes(4, "little")
    data[place : place + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(
        UsageError, match=r"'aaaa' is of type 99, which this version of the package gguf"
    ):
        open_files([path])


@pytest.mark.fault("GGUF type that nothing widens")
def test_a_type_that_nobody_widens(tmp_path: Path) -> None:
    path = write(tmp_path / "w.gguf", {"a": (np.zeros((2, 8), np.int32), None)})
    with pytest.raises(UsageError, match="'a' is in I32, which the package gguf does not widen"):
        open_files([path])


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "w.gguf", {"a": (np.ones(4, "f4"), None)})

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(gguf_file, "import_module", missing)
    with pytest.raises(EnvironmentMismatchError, match=r"pip install 'wanx\[gguf\]'"):
        open_files([path])


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "w.gguf", {"a": (blocks(Kind.Q8_0, 64, 512), Kind.Q8_0)})
    (source,) = open_files([path])[0].values()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptInputError, match="ended inside tensor 'a'"):
        numbers(source, "F32", 1 << 10)


def test_sides_of_one_are_not_stored(tmp_path: Path) -> None:
    """Modulations have three sides in the network, and two in files of some quantisers."""
    flat = np.ones((6, 256), "f4")
    quantised = (blocks(Kind.Q8_0, 6, 256), Kind.Q8_0)
    path = write(
        tmp_path / "w.gguf",
        {"blocks.0.modulation": (flat, None), "head.modulation": quantised, "a": (flat, None)},
    )
    shapes = {name: source.shape for name, source in open_files([path])[0].items()}
    assert shapes == {
        "blocks.0.modulation": (1, 6, 256), "head.modulation": (1, 6, 256), "a": (6, 256),
    }  # fmt: skip
    found = open_files([path])[0]["head.modulation"]
    expected = gguf.quants.dequantize(*quantised)
    np.testing.assert_array_equal(numbers(found, "F32", 1 << 10)[0], expected)


def test_metadata_are_those_of_the_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "wan")
    numbers = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 1 << 31}
    numbers |= {"int32": -(1 << 30), "uint64": 1 << 63, "int64": -(1 << 62), "bool": True}
    for kind, number in numbers.items():
        getattr(writer, f"add_{kind}")(f"n.{kind}", number)
    writer.add_float32("f", 0.1)
    writer.add_float64("d", 0.1)
    writer.add_string("s", "ü\n" * 40)
    writer.add_array("texts", ["a", "", "é" * 300])
    writer.add_array("floats", [0.5, -1.25])
    writer.add_array("numbers", list(range(1000)))
    writer.add_array("bools", [True, False])
    writer.add_tensor("a", np.ones((3, 2), "f4"))
    for act in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{act}_to_file")()
    writer.close()
    file, reader = read_gguf(tmp_path / "w.gguf"), gguf.GGUFReader(tmp_path / "w.gguf")
    for key, value in file.fields.items():
        expected = reader.fields[key].contents()
        assert (list(value) if isinstance(value, np.ndarray) else value) == expected, key
    assert len(file.fields) == len([k for k in reader.fields if not k.startswith("GGUF.")])


@pytest.mark.parametrize("alignment", [1, 32, 4096])
def test_alignment(alignment: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "wan")
    writer.add_custom_alignment(alignment)
    data = np.random.default_rng(0).standard_normal((3, 5)).astype("f4")
    writer.add_tensor("a", data)
    writer.add_tensor("b", 2 * data)
    for act in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{act}_to_file")()
    writer.close()
    tensors = read_gguf(tmp_path / "w.gguf").tensors
    np.testing.assert_array_equal(numbers(tensors["a"], "F32", 64), data)
    np.testing.assert_array_equal(numbers(tensors["b"], "F32", 64), 2 * data)


@pytest.mark.fault("cut or damaged GGUF")
def test_any_change_of_the_header_is_read_or_one_line(tmp_path: Path) -> None:
    """Whatever the bytes say, nothing but an error of ours is raised."""
    path = write(tmp_path / "w.gguf", {"a.weight": (blocks(Kind.Q8_0, 4, 64), Kind.Q8_0)})
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    header = len(whole) - 4 * 64 // 32 * 34
    for place in range(header):
        for value in {0, 1, 0x7F, 0xFF, int(generator.integers(256))}:
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with suppress(CorruptInputError, UsageError):
                assert len(open_files([path])[0]) <= 1


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, "is GGUF of version 1"), (3 << 24, "is big-endian"), (4, "version 4")],
)
def test_other_versions(version: int, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "w.gguf", {"a": (np.ones(4, "f4"), None)})
    data = path.read_bytes()
    path.write_bytes(data[:4] + version.to_bytes(4, "little") + data[8:])
    with pytest.raises(UsageError, match=words):
        open_files([path])
