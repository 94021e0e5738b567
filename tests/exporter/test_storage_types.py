"""Checkpoints in every type that safetensors can store: read, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save_file

from wanx.checkpoints.tensors.float8 import FLOAT8, Float8Tensor
from wanx.errors import CorruptInputError, UsageError
from wanx.exporter.export import plan
from wanx.exporter.options import PRECISIONS, ExportOptions
from wanx.files.floats import FLOATS

NARROW_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # the names of the others tell their width


def known_to_safetensors() -> list[str]:
    """The types that the package itself lists when it meets one that it does not know."""
    header = b'{"a":{"dtype":"?","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(SafetensorError) as caught:
        deserialize(len(header).to_bytes(8, "little") + header)
    return re.findall(r"`(\w+)`", str(caught.value))


def bits(dtype: str) -> int:
    if dtype == "BOOL":
        return 8
    return NARROW_BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])


def store_as(path: Path, dtype: str) -> None:
    """Give all matrices and kernels of a file another type, and as many bytes as it takes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), bytearray()
    header.pop("__metadata__", None)
    for entry in header.values():
        begin, end = (start + offset for offset in entry["data_offsets"])
        piece = data[begin:end]
        if len(entry["shape"]) >= 2:
            count = torch.Size(entry["shape"]).numel() * bits(dtype)
            entry["dtype"], piece = dtype, bytes(count // 8)
        entry["data_offsets"] = [len(body), len(body) + len(piece)]
        body += piece
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_the_list_of_types_is_whole() -> None:
    assert {*FLOATS, "F64", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"} <= {*known_to_safetensors()}


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("dtype", known_to_safetensors())
@pytest.mark.fault("unplanned storage type")
def test_a_type_is_read_or_refused_by_name(part: str, dtype: str, copied: Path) -> None:
    (path,) = (copied / part).glob("*.safetensors")
    store_as(path, dtype)
    for precision in ("auto", *PRECISIONS):
        options = ExportOptions(source=copied, precision=precision)
        if dtype in FLOATS:
            types = plan(options).resolved.checkpoint.components
            group = "dit" if part == "transformer" else part
            assert dtype in {tensor.dtype for tensor in types[group].tensors.values()}
            continue
        if dtype in FLOAT8:
            resolved = plan(options).resolved
            group = "dit" if part == "transformer" else part
            tensors = resolved.checkpoint.components[group].tensors.values()
            assert any(isinstance(tensor, Float8Tensor) for tensor in tensors)
            assert dtype not in {resolved.stored_type(group, tensor) for tensor in tensors}
            continue
        with pytest.raises(CorruptInputError) as caught:
            plan(options)
        message = str(caught.value)
        assert re.search(rf"\b{dtype}\b", message)
        assert "BF16" in message
        assert "\n" not in message


def test_scales_do_not_hide_the_type(copied: Path) -> None:
    """Other tools store integers with a scale beside each matrix."""
    (path,) = (copied / "transformer").glob("*.safetensors")
    scaled = {}
    for name, tensor in load_file(path).items():
        matrix = tensor.ndim == 2
        scaled[name] = tensor.to(torch.int8) if matrix else tensor
        if matrix:
            scaled[name.removesuffix("weight") + "scale_weight"] = torch.ones(())
    save_file(scaled, path)
    with pytest.raises(UsageError, match=r"weight' is I8 with a scale, which wanx does not read"):
        plan(ExportOptions(source=copied))
