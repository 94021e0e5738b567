"""Weights of 8-bit floats: plain ones, and ones with scales as ComfyUI's files have them.

Names and rules: ComfyUI's QUANTIZATION.md and ``comfy/ops.py``. Beside ``X.weight`` lie
``X.scale_weight`` (later ``X.weight_scale``), an fp32 scalar or one number for each row, and
sometimes ``X.scale_input`` (later ``X.input_scale``), which is about activations. A tensor
``scaled_fp8``, or ``X.comfy_quant`` with JSON in bytes, marks such files. W = numbers x scale.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.checkpoints.tensors.computed import ComputedTensor, Values
from wanx.checkpoints.tensors.source import TensorSource
from wanx.config.number_formats import FP8
from wanx.errors import CorruptInputError, UsageError
from wanx.files.floats import FLOATS
from wanx.files.input_file import parse_json_object

E4M3, E5M2 = FP8.safetensors, "F8_E5M2"
FLOAT8 = (E4M3, E5M2)
SCALES = ("scale_weight", "weight_scale")
# About activations, or marks; no network reads them.
_INPUT_SCALES = ("scale_input", "input_scale")
_MARK, _FORMAT = "scaled_fp8", "comfy_quant"
_MAX_FORMAT_BYTES = 4096
_FORMATS = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}


@dataclass(frozen=True, kw_only=True)
class Float8Tensor(ComputedTensor):
    """Numbers of 8 bits, times a scale if they have one.

    Attributes:
        codes: the 8-bit tensor.
        scale: a scalar, or one number for each row; None for plain numbers.
    """

    codes: TensorSource
    scale: TensorSource | None = None

    @classmethod
    def of(cls, codes: TensorSource, scale: TensorSource | None = None) -> Float8Tensor:
        """Make the tensor of its stored parts.

        Raises:
            CorruptInputError: there are neither one scale nor one for each row.
        """
        if scale is not None:
            rows = codes.shape[0] if codes.shape else 1
            known = scale.shape in ((), (1,), (1, 1), (rows,), (rows, 1))
            if not known or scale.dtype not in FLOATS:
                raise CorruptInputError(
                    f"{scale.file}: {scale.name!r} is {scale.dtype} {list(scale.shape)}, and "
                    f"{codes.name!r} with {list(codes.shape)} takes one scale or one for each row; "
                    "download the file again"
                )
        return cls(
            name=codes.name,
            dtype="F32",
            shape=codes.shape,
            nbytes=4 * codes.nbytes,
            file=codes.file,
            codes=codes,
            scale=scale,
        )

    @property
    def stored_bytes(self) -> int:
        """Size of the codes and the scale."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def position(self) -> int:
        """Place of the codes."""
        return self.codes.position

    def rows(self, numbers: int, *, wide: bool) -> Iterator[Values]:
        """Decode rows; a product of 4 and 24 bits is exact in float64."""
        table = _table(self.codes.dtype)
        scales = np.ones((1, 1)) if self.scale is None else self.scales().reshape(-1, 1)
        height, start = self.rows_at_once(numbers), 0
        for piece in self.codes.iter_bytes(height * self.columns):
            values = table[np.frombuffer(piece, np.uint8)].reshape(-1, self.columns)
            if len(scales) > 1:
                values *= scales[start : start + len(values)]
            elif self.scale is not None:
                values *= scales
            start += len(values)
            yield values if wide else values.astype(np.float32)

    def scales(self) -> NDArray[np.float64]:
        """Read the scales, in float64.

        Raises:
            CorruptInputError: one is not finite.
        """
        assert self.scale is not None
        pieces = [np.frombuffer(p, "<f4") for p in self.scale.iter_converted("F32")]
        return np.concatenate(pieces).astype(np.float64)


@functools.cache
def _table(dtype: str) -> NDArray[np.float64]:
    """The number of each of 256 codes."""
    codes = np.arange(256)
    mantissa_bits = 3 if dtype == E4M3 else 2
    exponent_bits = 7 - mantissa_bits
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    hidden = np.where(exponent > 0, 1 << mantissa_bits, 0)
    power = np.maximum(exponent, 1) - bias - mantissa_bits
    values = np.ldexp((hidden + mantissa).astype(np.float64), power)
    top = exponent == (1 << exponent_bits) - 1
    if dtype == E4M3:  # "fn": finite but for one NaN of either sign
        values[top & (mantissa == (1 << mantissa_bits) - 1)] = np.nan
    else:
        values[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    signed: NDArray[np.float64] = np.where(codes & 128, -values, values)
    return signed


def decoded(
    tensors: Mapping[str, TensorSource], formats: Mapping[str, str] = MappingProxyType({})
) -> dict[str, TensorSource]:
    """Join 8-bit tensors with their scales, and leave out what marks them.

    Args:
        tensors: of a file, by stored name.
        formats: of layers, as the file's header has them; see :func:`formats_in`.

    Raises:
        CorruptInputError: scales are missing, or fit nothing.
        UsageError: the numbers are in a format that wanx does not read.
    """
    formats = dict(formats) | {
        name.removesuffix(f".{_FORMAT}"): _format_of(source)
        for name, source in tensors.items()
        if name.endswith(f".{_FORMAT}")
    }
    marks = [name for name in tensors if name.rpartition(".")[2] == _MARK]
    scales: dict[str, TensorSource] = {}
    others: dict[str, TensorSource] = {}
    for name, source in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in SCALES:
            if other := scales.get(f"{stem}.weight"):
                raise CorruptInputError(
                    f"{source.file} has two scales for one weight, {other.name!r} and {name!r}; "
                    "download the file again"
                )
            scales[f"{stem}.weight"] = source
        elif last not in (*_INPUT_SCALES, _FORMAT, _MARK):
            others[name] = source
    scaled = bool(marks or formats or scales)
    if stray := [scale.name for name, scale in scales.items() if name not in others]:
        raise CorruptInputError(
            f"{scales[_weight(stray[0])].file} has scales without weights, {stray[0]!r} first; "
            "download the file again"
        )
    found: dict[str, TensorSource] = {}
    for name, source in others.items():
        scale = scales.get(name)
        if source.dtype not in FLOAT8:
            if scale is not None and not _is_one(source, scale):
                raise UsageError(
                    f"{source.file}: {name!r} is {source.dtype} with a scale, which wanx does not "
                    f"read; use a file in {' or '.join(_FORMATS)}, or in 16 bits"
                )
            found[name] = source
            continue
        stem = name.removesuffix(".weight")
        said = formats.get(stem)
        if said is not None and _FORMATS[said] != source.dtype:
            raise CorruptInputError(
                f"{source.file}: {name!r} is {source.dtype}, and the file says {said}; download it "
                "again"
            )
        if (
            scale is None
            and scaled
            and name.endswith(".weight")
            and stem in (formats or {stem: ""})
        ):
            raise CorruptInputError(
                f"{source.file}: {name!r} is in 8 bits of a scaled file and has no scale; download "
                "the file again"
            )
        found[name] = Float8Tensor.of(source, scale)
    return found


def _weight(scale: str) -> str:
    return f"{scale.rpartition('.')[0]}.weight"


def _is_one(weight: TensorSource, scale: TensorSource) -> bool:
    """True for the scale that stands beside layers that stay high."""
    return weight.dtype in FLOATS and bool((Float8Tensor.of(weight, scale).scales() == 1).all())


def formats_in(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Formats of layers that a header names in ``_quantization_metadata``.

    Raises:
        CorruptInputError: it says nothing of the kind.
        UsageError: one is another than 8-bit floats.
    """
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    layers = parse_json_object(text.encode(), file).get("layers")
    if not isinstance(layers, dict):
        raise CorruptInputError(
            f"{file}: its header does not say how layers are stored; download the file again"
        )
    return {str(name): _known_format(file, str(name), facts) for name, facts in layers.items()}


def _format_of(source: TensorSource) -> str:
    """Format that a ``comfy_quant`` tensor names."""
    facts: Any = None
    if source.nbytes <= _MAX_FORMAT_BYTES:
        text = b"".join(bytes(piece) for piece in source.iter_bytes())
        with suppress(CorruptInputError):
            facts = parse_json_object(text, source.file)
    return _known_format(source.file, source.name, facts)


def _known_format(file: Path, layer: str, facts: Any) -> str:
    match facts:
        case {"format": str(name)} if name in _FORMATS:
            return name
        case {"format": str(name)}:
            raise UsageError(
                f"{file}: {layer[:80]!r} is in the format {name[:40]!r}, which wanx does not "
                f"read; use a file in {' or '.join(_FORMATS)}, or in 16 bits"
            )
    raise CorruptInputError(
        f"{file}: {layer[:80]!r} does not say how the layer is stored; download the file again"
    )
