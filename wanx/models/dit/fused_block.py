"""A block of the diffusion transformer with its memory-bound steps fused, for GPUs.

The numbers are those of :class:`wanx.models.dit.block.Block`, but for rounding: what was rounded to
16 bits on its way from one step to the next now stays in fp32 inside a kernel. The parameters are
the block's own; queries, keys and values may come from one packed layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanx.kernels.adaln import adaln
from wanx.kernels.adaln_quantize import adaln_quantize, adaln_quantize_rows
from wanx.kernels.attention.op import attention
from wanx.kernels.gated_residual import gated_residual
from wanx.kernels.gelu_quantize import gelu_quantize, gelu_quantize_rows
from wanx.kernels.quant_linear import quant_linear, quant_linear_rows
from wanx.kernels.quant_linear_gelu_quantize import quant_linear_gelu_quantize
from wanx.kernels.quant_linear_residual import quant_linear_residual
from wanx.kernels.residual_adaln import residual_adaln, residual_adaln_quantize
from wanx.kernels.rms_norm_rope import rms_norm_rope
from wanx.models.dit.block import Block, VaceBlock, fold_smoothing, split_modulation
from wanx.models.quantized import DynamicQuantLinear, QuantLinear


@dataclass(frozen=True)
class QuantizedActivation:
    """Quantised activation: numbers, and their one scale ``[]`` or one per row ``[..., 1]``."""

    x8: Tensor
    scale: Tensor


Activation = Tensor | QuantizedActivation
Layer = nn.Linear | QuantLinear | DynamicQuantLinear


class FusedBlock(nn.Module):
    """A block whose steps between two products are one kernel each.

    Attributes:
        sources: for each parameter of a packed layer, the names of the parameters of the block that
            it holds one after the other.
    """

    def __init__(self, block: Block, *, packed: bool = True) -> None:
        """Take over the modules of ``block``, which is of no use afterwards.

        Args:
            block: as it was built, or with 8-bit layers.
            packed: make one layer of queries, keys and values where their kinds allow it.
        """
        super().__init__()
        self.eps = block.eps
        self.self_attn = block.self_attn
        self.norm3 = block.norm3
        self.cross_attn = block.cross_attn
        self.ffn = block.ffn
        self.modulation = block.modulation
        self.attn_smooth = block.attn_smooth
        self.ffn_smooth = block.ffn_smooth
        if isinstance(block, VaceBlock):
            self.before_proj = block.before_proj
            self.after_proj = block.after_proj
        self.sources: dict[str, tuple[str, ...]] = {}
        self.qkv: Layer | None = None
        if packed:
            self._pack()

    def _pack(self) -> None:
        attn = self.self_attn
        parts = {name: getattr(attn, name) for name in "qkv"}
        whole = _packed_linear(*parts.values())
        if whole is None:
            return
        for parameter, _ in whole.named_parameters():
            owners = parts if parameter != "input_scale" else ("q",)
            names = tuple(f"self_attn.{name}.{parameter}" for name in owners)
            self.sources[f"qkv.{parameter}"] = names
        for name in parts:
            delattr(attn, name)
        self.qkv = whole

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        text: Tensor,
        image: Tensor | None = None,
    ) -> Tensor:
        """Transform ``x`` ``[B, L, D]``; see :class:`wanx.models.dit.block.Block`."""
        dtype, eps = text.dtype, self.eps
        first, _, second = cast(tuple[Layer, nn.Module, Layer], tuple(self.ffn))
        modulation = self.modulation.float() + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = split_modulation(modulation)
        attn = self.self_attn
        consumer = self.qkv or _shared_consumer(attn.q, attn.k, attn.v)
        y = _adaln(x, *fold_smoothing(scale, shift, self.attn_smooth), eps, consumer, dtype)
        z = self._self_attention(y, rope_cos, rope_sin)
        # LN with a weight and a bias is an AdaLN whose modulation is the same at every step.
        weight, bias = (t.float().view(1, 1, -1) for t in (self.norm3.weight, self.norm3.bias))
        x, y = _residual_adaln(x, z, gate, weight - 1, bias, eps, self.cross_attn.q)
        z = self._cross_attention(y, text, image)
        x, y = _residual_adaln(
            x, z, torch.ones_like(weight),
            *fold_smoothing(ffn_scale, ffn_shift, self.ffn_smooth), eps, first,
        )  # fmt: skip
        return _residual(x, second, _apply_gelu(first, y, second), ffn_gate)

    def _self_attention(self, y: Activation, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        attn = self.self_attn
        if self.qkv is not None:
            q, k, v = _apply(self.qkv, y).tensor_split(3, dim=-1)
        else:
            q, k, v = (_apply(layer, y) for layer in (attn.q, attn.k, attn.v))
        q, k = rms_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight, rope_cos, rope_sin,
            num_heads=attn.num_heads, eps=attn.eps,
        )  # fmt: skip
        out: Tensor = attn.o(attn.attend(q, k, v))
        return out

    def _cross_attention(self, y: Activation, text: Tensor, image: Tensor | None) -> Tensor:
        attn = self.cross_attn
        q = attn.norm_q(_apply(attn.q, y))
        z = attention(q, attn.norm_k(attn.k(text)), attn.v(text), num_heads=attn.num_heads)
        if image is not None:
            k = attn.norm_k_img(attn.k_img(image))
            z = z + attention(q, k, attn.v_img(image), num_heads=attn.num_heads)
        out: Tensor = attn.o(z)
        return out


def _packed_linear(q: Layer, k: Layer, v: Layer) -> Layer | None:
    """One layer in the place of three that read the same input, or None where they differ."""
    layers = (q, k, v)
    if _shared_consumer(*layers) is None:
        return None
    columns = q.weight.shape[1]
    count = sum(layer.weight.shape[0] for layer in layers)
    if isinstance(q, nn.Linear):
        return nn.Linear(columns, count, device=q.weight.device, dtype=q.weight.dtype)
    if q.weight_scale.ndim == 0:
        return None  # a scale for each whole weight
    if isinstance(q, QuantLinear):
        return QuantLinear(columns, count, dtype=q.weight.dtype)
    return DynamicQuantLinear(columns, count)


def _shared_consumer(*layers: Layer) -> Layer | None:
    """The layer that stands for all that read one tensor; None where their kinds differ."""
    return layers[0] if len({type(layer) for layer in layers}) == 1 else None


def _adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    consumer: Layer | None,
    dtype: torch.dtype,
) -> Activation:
    """Normalise and modulate ``x`` into what ``consumer`` reads."""
    if isinstance(consumer, QuantLinear):
        q_scale = consumer.shared_scale
        x8 = adaln_quantize(x, scale, shift, q_scale, eps=eps, dtype=consumer.weight.dtype)
        return QuantizedActivation(x8, q_scale)
    if isinstance(consumer, DynamicQuantLinear):
        return QuantizedActivation(*adaln_quantize_rows(x, scale, shift, eps=eps))
    return adaln(x, scale, shift, eps=eps, dtype=dtype)


def _residual_adaln(
    x: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    consumer: Layer,
) -> tuple[Tensor, Activation]:
    """Add ``z · gate`` to the stream, then as :func:`_adaln`."""
    if isinstance(consumer, QuantLinear):
        q_scale = consumer.shared_scale
        x, x8 = residual_adaln_quantize(
            x, z, gate, scale, shift, q_scale, eps=eps, dtype=consumer.weight.dtype
        )
        return x, QuantizedActivation(x8, q_scale)
    if isinstance(consumer, DynamicQuantLinear):
        x = gated_residual(x, z, gate)
        return x, QuantizedActivation(*adaln_quantize_rows(x, scale, shift, eps=eps))
    return residual_adaln(x, z, gate, scale, shift, eps=eps)


def _apply_gelu(layer: Layer, y: Activation, consumer: Layer) -> Activation:
    """Apply ``layer`` and GELU; make what ``consumer`` reads."""
    if isinstance(layer, QuantLinear) and isinstance(consumer, QuantLinear):
        assert isinstance(y, QuantizedActivation)
        assert layer.bias is not None
        q_scale = consumer.shared_scale
        x8 = quant_linear_gelu_quantize(
            y.x8, y.scale, layer.weight, layer.weight_scale, layer.bias, q_scale,
            consumer.weight.dtype,
        )  # fmt: skip
        return QuantizedActivation(x8, q_scale)
    y = _apply(layer, y)
    if isinstance(consumer, QuantLinear):
        q_scale = consumer.shared_scale
        return QuantizedActivation(gelu_quantize(y, q_scale, consumer.weight.dtype), q_scale)
    if isinstance(consumer, DynamicQuantLinear):
        return QuantizedActivation(*gelu_quantize_rows(y))
    return F.gelu(y, approximate="tanh")


def _residual(x: Tensor, layer: Layer, y: Activation, gate: Tensor) -> Tensor:
    """Apply ``layer`` and add what it gives to the stream, times ``gate``."""
    if isinstance(layer, QuantLinear) and isinstance(y, QuantizedActivation):
        assert layer.bias is not None
        return quant_linear_residual(
            y.x8, y.scale, layer.weight, layer.weight_scale, layer.bias, x, gate
        )
    return gated_residual(x, _apply(layer, y), gate)


def _apply(layer: Layer, y: Activation) -> Tensor:
    if isinstance(y, QuantizedActivation):
        assert not isinstance(layer, nn.Linear)
        assert layer.bias is not None
        product = quant_linear if y.scale.ndim == 0 else quant_linear_rows
        return product(y.x8, y.scale, layer.weight, layer.weight_scale, layer.bias)
    out: Tensor = layer(y)
    return out
