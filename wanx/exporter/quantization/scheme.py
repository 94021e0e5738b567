"""Number formats of 8-bit layers, and how the user asks for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from wanx.config import number_formats
from wanx.config.number_formats import UINT8, NumberFormat
from wanx.errors import UsageError

if TYPE_CHECKING:
    import torch

WEIGHT_ONLY: Final = "int8-weight"
QUANTIZED = ("dit", "text_encoder")  # components that have 8-bit layers


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """An 8-bit number format as layers use it.

    Attributes:
        name: what ``--precision`` calls it, or :data:`WEIGHT_ONLY`.
        format: of weights, and of activations unless it is for weights only.
        layer_gate_db: signal-to-noise ratio of its output below which a layer stays high.
    """

    name: str
    format: NumberFormat
    layer_gate_db: float

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's dtype of the format."""
        import torch

        dtype: torch.dtype = getattr(torch, self.format.torch)
        return dtype

    @property
    def stored(self) -> str:
        """Safetensors' name of the format."""
        return self.format.safetensors

    @property
    def limit(self) -> float:
        """Largest magnitude; a scale is the largest value of what is quantised over this."""
        return self.format.largest


SCHEMES = {
    row.name: Scheme(name=row.name, format=row, layer_gate_db=row.layer_gate_db)
    for row in number_formats.QUANTIZED
    if row.layer_gate_db is not None
} | {WEIGHT_ONLY: Scheme(name=WEIGHT_ONLY, format=UINT8, layer_gate_db=0)}


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Options of quantisation, as the user gave them.

    Attributes:
        components: which components get 8-bit layers.
        skip_layers: patterns (``blocks.0.*``, ``*.cross_attn.k``) of layers that stay as they are.
        weight_scale: one scale per output channel, or one per tensor (fp8 only).
        activation_scale: fixed by calibration, or found per token while running (fp8 only).
        smooth: SmoothQuant's α, how far outliers move from activations into weights; 0 is off.
        attention: ``fp8`` quantises Q, K, V and the probabilities of self-attention too.
        layer_gate_db: a layer below this stays high; None takes the scheme's own.
        percentile: of the magnitudes, above which activations are clipped; 100 clips none. Inputs
            that are smoothed or scaled per token are never clipped.
    """

    components: tuple[str, ...] = QUANTIZED
    skip_layers: tuple[str, ...] = ()
    weight_scale: Literal["channel", "tensor"] = "channel"
    activation_scale: Literal["static", "dynamic"] = "static"
    smooth: float = 0.0
    attention: Literal["none", "fp8"] = "none"
    layer_gate_db: float | None = None
    percentile: float = 100.0

    def __post_init__(self) -> None:
        """Refuse what no scheme has.

        Raises:
            UsageError: a component without 8-bit layers or none at all, or a number out of range.
        """
        if not self.components:
            raise UsageError(f"--quantize names nothing; choose {' or '.join(QUANTIZED)}")
        for name in self.components:
            if name not in QUANTIZED:
                raise UsageError(
                    f"{name} has no 8-bit layers; choose {' or '.join(QUANTIZED)} for --quantize"
                )
        if not 0 <= self.smooth <= 1:
            raise UsageError(f"--smooth is {self.smooth:g}; choose 0 (off) to 1, such as 0.5")
        if not 50 <= self.percentile <= 100:
            raise UsageError(
                f"--percentile is {self.percentile:g}; choose 50 to 100 (clip nothing)"
            )
        if self.layer_gate_db is not None and not math.isfinite(self.layer_gate_db):
            raise UsageError(
                f"--layer-gate is {self.layer_gate_db:g}; choose a finite number of dB, such as 24"
            )
        choices = {
            "weight_scale": ("channel", "tensor"),
            "activation_scale": ("static", "dynamic"),
            "attention": ("none", "fp8"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                flag = name.replace("_", "-")
                raise UsageError(
                    f"--{flag} {getattr(self, name)} is not available; choose "
                    f"{' or '.join(allowed)}"
                )

    def check(self, scheme: str) -> None:
        """Refuse options that ``scheme`` does not have.

        Raises:
            UsageError: names the option.
        """
        if scheme == "fp8":
            return
        for flag, value, plain in (
            ("--weight-scale", self.weight_scale, "channel"),
            ("--activation-scale", self.activation_scale, "static"),
            ("--attention", self.attention, "none"),
        ):
            if value != plain:
                raise UsageError(f"{flag} {value} is for --precision fp8, not {scheme}")
