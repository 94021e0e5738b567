"""Number formats: one row for each, with what files, PyTorch, ONNX, Triton and TensorRT call it.

A format that weights may have is a row here and its kernels, which are registered and tuned by the
row's name; whatever asks which formats there are derives its own table from these rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """One number format.

    Attributes:
        safetensors: in the header of a weight file, and in the schedule of an engine.
        torch: attribute of ``torch``; also that of numpy, where numpy has the format.
        bits: of one number.
        name: in ``--precision``, manifests, plug-ins and the tuning table.
        onnx: number in ``TensorProto.DataType``.
        triton: type of what a pointer points to; empty for what no kernel takes.
        tensorrt: member of ``DataType``.
        tensorrt_layer: type of an operand in the log of a verbose build.
        oldest_sm: GPU from which on there are kernels for it.
        exponent_bits: of a floating-point format.
        mantissa_bits: the same, without the hidden one.
        largest: largest magnitude that is quantised to.
        zero_point: stored number that stands for zero.
        weights: whether weights may be stored in it.
        layer_gate_db: signal-to-noise ratio of a layer's output below which the layer is not
            quantised to it; None for a format that nothing is quantised to.
    """

    safetensors: str
    torch: str
    bits: int
    name: str = ""
    onnx: int = 0
    triton: str = ""
    tensorrt: str = ""
    tensorrt_layer: str = ""
    oldest_sm: int = 80
    exponent_bits: int = 0
    mantissa_bits: int = 0
    largest: float = 0.0
    zero_point: int = 0
    weights: bool = False
    layer_gate_db: float | None = None

    @property
    def lowest(self) -> float:
        """Most negative number that is rounded to; integers have one more below zero."""
        return -self.largest - (0 if self.exponent_bits else 1)

    @property
    def infinity(self) -> int:
        """Bit pattern of +infinity of an IEEE format; all above it up to the sign bit is NaN."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, which is 2 to this power."""
        return 2 - (1 << (self.exponent_bits - 1))

    def nbytes(self, count: int) -> int:
        """Bytes of ``count`` numbers, which must fill whole bytes."""
        assert count * self.bits % 8 == 0, f"{count} numbers of {self.bits} bits"
        return count * self.bits // 8


FP32 = NumberFormat(
    safetensors="F32", torch="float32", bits=32, name="fp32", onnx=1, triton="fp32",
    tensorrt="FLOAT", exponent_bits=8, mantissa_bits=23, weights=True,
)  # fmt: skip
BF16 = NumberFormat(
    safetensors="BF16", torch="bfloat16", bits=16, name="bf16", onnx=16, triton="bf16",
    tensorrt="BF16", exponent_bits=8, mantissa_bits=7, weights=True,
)  # fmt: skip
FP16 = NumberFormat(
    safetensors="F16", torch="float16", bits=16, name="fp16", onnx=10, triton="fp16",
    tensorrt="HALF", exponent_bits=5, mantissa_bits=10, weights=True,
)  # fmt: skip
INT8 = NumberFormat(
    # -128 is left out for symmetry.
    safetensors="I8", torch="int8", bits=8, name="int8", onnx=3, triton="i8",
    tensorrt="INT8", tensorrt_layer="Int8", largest=127.0, weights=True, layer_gate_db=24.0,
)  # fmt: skip
FP8 = NumberFormat(
    # Gives 28.5 dB where nothing stands out. With a gate of 25 dB the last step of the built-in
    # model falls below a cosine of 0.99.
    safetensors="F8_E4M3", torch="float8_e4m3fn", bits=8, name="fp8", onnx=17, triton="fp8e4nv",
    tensorrt="FP8", tensorrt_layer="FP8", oldest_sm=89, exponent_bits=4, mantissa_bits=3,
    largest=448.0, weights=True, layer_gate_db=27.5,
)  # fmt: skip
# int8 plus 128, for weights whose activations stay high: what processors multiply as it is stored.
UINT8 = NumberFormat(
    safetensors="U8", torch="uint8", bits=8, name="uint8", onnx=2, tensorrt="UINT8", largest=127.0,
    zero_point=128, weights=True,
)  # fmt: skip
INT64 = NumberFormat(
    safetensors="I64", torch="int64", bits=64, name="int64", onnx=7, tensorrt="INT64"
)
INT32 = NumberFormat(
    safetensors="I32", torch="int32", bits=32, name="int32", onnx=6, triton="i32", tensorrt="INT32"
)
# What weight files may hold beside them; of such a tensor wanx reads the size alone.
_OTHERS = (
    NumberFormat(safetensors="BOOL", torch="bool", bits=8),
    NumberFormat(safetensors="U16", torch="uint16", bits=16),
    NumberFormat(safetensors="U32", torch="uint32", bits=32),
    NumberFormat(safetensors="U64", torch="uint64", bits=64),
    NumberFormat(safetensors="I16", torch="int16", bits=16),
    NumberFormat(safetensors="F64", torch="float64", bits=64),
    NumberFormat(safetensors="C64", torch="complex64", bits=64),
    NumberFormat(safetensors="F8_E5M2", torch="float8_e5m2", bits=8),
    NumberFormat(safetensors="F8_E8M0", torch="float8_e8m0fnu", bits=8),
    NumberFormat(safetensors="F8_E4M3FNUZ", torch="float8_e4m3fnuz", bits=8),
    NumberFormat(safetensors="F8_E5M2FNUZ", torch="float8_e5m2fnuz", bits=8),
)
FORMATS = (FP32, BF16, FP16, INT8, FP8, UINT8, INT64, INT32, *_OTHERS)
BY_SAFETENSORS = {row.safetensors: row for row in FORMATS}

WEIGHTS = tuple(row for row in FORMATS if row.weights)
QUANTIZED = tuple(row for row in WEIGHTS if row.layer_gate_db is not None)
FLOATS = (FP32, BF16, FP16)  # converted to each other
PRECISIONS = (*FLOATS, *QUANTIZED)
GRAPH_INPUTS = (*WEIGHTS, INT64)
KERNEL_TENSORS = tuple(row for row in FORMATS if row.triton)


def one_of(names: Iterable[str]) -> str:
    """Regular expression that matches each of ``names``, as a whole, and nothing else."""
    return f"^({'|'.join(names)})$"
