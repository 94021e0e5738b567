"""The table of number formats against those who made the formats."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from safetensors.torch import save

from wanx.config.number_formats import (
    BY_SAFETENSORS,
    FLOATS,
    FORMATS,
    GRAPH_INPUTS,
    KERNEL_TENSORS,
    QUANTIZED,
    WEIGHTS,
    NumberFormat,
    one_of,
)
from wanx.files.floats import NUMPY
from wanx.kernels.number_formats import FORMATS as BY_DTYPE
from wanx.kernels.quantize import RANGES, launch_quantize, quantize_reference

FLOATING = [row for row in FORMATS if row.exponent_bits]
PACKED = {"F4"}  # two numbers to a byte, which nothing of wanx reads


def dtype_of(row: NumberFormat) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, row.torch)
    return dtype


def name_in_file(dtype: torch.dtype) -> str | None:
    """What safetensors writes for a tensor of a type; None where it refuses it."""
    try:
        data = save({"x": torch.zeros(16, dtype=torch.uint8).view(dtype)})
    except (KeyError, RuntimeError, TypeError):
        return None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name: str = header["x"]["dtype"]
    return name


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.safetensors)
def test_a_row_is_what_pytorch_and_safetensors_say(row: NumberFormat) -> None:
    assert dtype_of(row).itemsize * 8 == row.bits
    assert name_in_file(dtype_of(row)) == row.safetensors
    assert row.nbytes(7) == torch.empty(7, dtype=dtype_of(row)).nbytes
    assert NUMPY[row.safetensors].itemsize == dtype_of(row).itemsize
    if hasattr(np, row.torch):
        array = torch.zeros(1, dtype=dtype_of(row)).numpy()
        assert array.dtype == NUMPY[row.safetensors]


def test_it_has_all_that_safetensors_writes() -> None:
    dtypes = {each for each in vars(torch).values() if isinstance(each, torch.dtype)}
    written = {name for dtype in dtypes if (name := name_in_file(dtype)) is not None}
    assert {"F32", "BF16", "F8_E4M3"} < written
    assert written - PACKED == BY_SAFETENSORS.keys()


def test_names_are_unique() -> None:
    for column in ("safetensors", "torch", "name", "onnx", "triton", "tensorrt", "tensorrt_layer"):
        values = [value for row in FORMATS if (value := getattr(row, column))]
        assert len(values) == len(set(values)), column


@pytest.mark.parametrize("row", [r for r in FORMATS if r.onnx], ids=lambda row: row.safetensors)
def test_a_number_of_onnx_is_onnx_own(row: NumberFormat) -> None:
    assert ir.DataType(row.onnx) == from_torch_dtype(dtype_of(row))
    name = onnx.TensorProto.DataType.Name(row.onnx)
    assert ir.DataType[name] == ir.DataType(row.onnx)
    assert ir.DataType(row.onnx).bitwidth == row.bits


@pytest.mark.parametrize("row", FLOATING, ids=lambda row: row.safetensors)
def test_a_floating_point_format_is_built_as_pytorch_says(row: NumberFormat) -> None:
    facts = torch.finfo(dtype_of(row))
    assert 1 + row.exponent_bits + row.mantissa_bits == row.bits
    assert 2.0**-row.mantissa_bits == facts.eps
    assert 2.0**row.min_exponent == facts.tiny


def test_infinity() -> None:
    for row in FLOATS:
        bits = torch.tensor(row.infinity, dtype={2: torch.int16, 4: torch.int32}[row.bits // 8])
        assert bits.view(dtype_of(row)).item() == math.inf


def test_the_range_that_is_quantised_to() -> None:
    assert {row.name for row in QUANTIZED} == {"int8", "fp8"}
    for row in QUANTIZED:
        dtype = dtype_of(row)
        facts = torch.finfo(dtype) if row.exponent_bits else torch.iinfo(dtype)
        assert (row.lowest, row.largest) == (facts.min, facts.max) == RANGES[dtype]


@pytest.mark.parametrize("row", QUANTIZED, ids=lambda row: row.name)
def test_the_numbers_in_kernels_are_those_of_the_table(row: NumberFormat) -> None:
    """Triton wants them as literals."""
    from tests.support.interpreter import DEVICE, patch_interpreter

    patch_interpreter()
    x = torch.tensor([[1e30, -1e30, row.largest, 0.0]], device=DEVICE)
    one = torch.ones((), device=DEVICE)
    q, _ = launch_quantize(x, one, dtype_of(row))
    assert q.float().tolist() == [[row.largest, row.lowest, row.largest, 0.0]]
    assert torch.equal(q.float(), quantize_reference(x, one, dtype_of(row)).float())
    if row.exponent_bits:
        q, scales = launch_quantize(x[:, 2:], None, dtype_of(row))
        assert (q.float().tolist(), scales.item()) == ([[row.largest, 0.0]], 1.0)


def test_triton_knows_the_types_of_pointers() -> None:
    names = pytest.importorskip("triton._utils")
    for row in KERNEL_TENSORS:
        assert names.type_canonicalisation_dict[row.torch] == row.triton
        assert names.BITWIDTH_DICT[row.triton] == row.bits


def test_tensorrt_knows_the_types() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for row in FORMATS:
        if row.tensorrt:
            assert getattr(trt.DataType, row.tensorrt).itemsize == dtype_of(row).itemsize


def test_which_formats_serve_what() -> None:
    """As bundles and engines made before have them."""

    def names(rows: tuple[NumberFormat, ...]) -> list[str]:
        return [row.safetensors for row in rows]

    assert names(WEIGHTS) == ["F32", "BF16", "F16", "I8", "F8_E4M3", "U8"]
    assert names(FLOATS) == ["F32", "BF16", "F16"]
    assert names(GRAPH_INPUTS) == [*names(WEIGHTS), "I64"]
    assert {row.name for row in KERNEL_TENSORS} == {
        *("fp32", "bf16", "fp16", "fp8", "int8", "int32")
    }
    assert all(BY_DTYPE[dtype_of(row)] is row for row in FORMATS)


def test_one_of_matches_whole_names() -> None:
    import re

    assert re.match(one_of(["F16", "F32"]), "F32")
    for text in ("BF16", "F1", "F16F32", ""):
        assert not re.match(one_of(["F16", "F32"]), text)
