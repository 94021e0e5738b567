"""Layers with 8-bit weights, and how a weight becomes 8-bit.

Parameters are named as in the bundle's weight files: ``weight`` (8-bit, ``[out, in]``),
``weight_scale`` (fp32, ``[out]`` or ``[]``), ``input_scale`` (fp32, ``[]``) and ``bias``. They are
built from sizes alone, so that a model can be traced without them, and get no gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanx.config.number_formats import UINT8
from wanx.kernels.attention.quant_attention import quant_attention
from wanx.kernels.number_formats import FORMATS
from wanx.kernels.quant_linear import quant_linear, quant_linear_rows
from wanx.kernels.quantize import quantize, quantize_reference, quantize_rows
from wanx.kernels.weight_only_linear import weight_only_linear


def quantize_weight(
    weight: Tensor, dtype: torch.dtype, *, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise a weight symmetrically around zero.

    Args:
        weight: ``[N, K]``, any floating dtype.
        dtype: ``torch.int8``, ``torch.uint8`` (int8 plus 128) or ``torch.float8_e4m3fn``.
        per_tensor: one scale for all rows instead of one for each.

    Returns:
        The weight in ``dtype`` and its scale in fp32, ``[N]`` or ``[]``: amax |weight| over 448 for
        e4m3 and over 127 otherwise, or 1 where that is zero or no normal number of fp32.

    Raises:
        ValueError: the weight is not finite.
    """
    w = weight.float()
    amax = w.abs().amax() if per_tensor else w.abs().amax(1)
    if not bool(amax.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity; 8 bits can store only finite numbers")
    scale = amax / FORMATS[dtype].largest
    scale = scale.where(scale >= torch.finfo(torch.float32).tiny, 1.0)
    if dtype == torch.uint8:
        signed = quantize_reference(w, scale.reshape(-1, 1), torch.int8)
        return (signed.short() + UINT8.zero_point).to(dtype), scale
    return quantize_reference(w, scale.reshape(-1, 1), dtype), scale


def _frozen(*shape: int, dtype: torch.dtype, fill: float = 0) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, fill, dtype=dtype), requires_grad=False)


class _QuantLinearBase(nn.Module):
    """Base of the linear layers: ``weight``, ``weight_scale`` and ``bias``."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        per_tensor: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        rows = () if per_tensor else (out_features,)
        self.weight = _frozen(out_features, in_features, dtype=dtype)
        self.weight_scale = _frozen(*rows, dtype=torch.float32, fill=1)
        self.register_parameter(
            "bias", _frozen(out_features, dtype=torch.get_default_dtype()) if bias else None
        )


class QuantLinear(_QuantLinearBase):
    """A linear layer whose input and weight are 8-bit, with a static scale for the input.

    Args:
        in_features: K.
        out_features: N.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``, of input and weight.
        per_tensor: one scale for the whole weight instead of one for each row.
        same_input: another layer that reads the same input; this one has no ``input_scale`` then,
            but reads the other's. Registered under two names, it would be traced under the last.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        per_tensor: bool = False,
        same_input: QuantLinear | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype=dtype, per_tensor=per_tensor)
        # In a tuple, so that the other layer does not become a child of this one.
        self._scale_owner: tuple[QuantLinear] = (
            (self,) if same_input is None else same_input._scale_owner
        )
        if same_input is None:
            self.input_scale = _frozen(dtype=torch.float32, fill=1)

    @property
    def shared_scale(self) -> Tensor:
        """The static scale of the input ``[]`` in fp32, its own or that of ``same_input``."""
        return self._scale_owner[0].input_scale

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[..., K]`` to ``[..., N]``."""
        assert self.bias is not None
        x_scale = self.shared_scale
        x8 = quantize(x, x_scale, self.weight.dtype)
        y = quant_linear(x8, x_scale, self.weight, self.weight_scale, self.bias)
        return y.to(x.dtype)


class DynamicQuantLinear(_QuantLinearBase):
    """A linear layer in e4m3 that finds the scale of each row of its input as it comes.

    Args:
        in_features: K.
        out_features: N.
        per_tensor: one scale for the whole weight instead of one for each row.
    """

    def __init__(self, in_features: int, out_features: int, *, per_tensor: bool = False) -> None:
        super().__init__(
            in_features, out_features, dtype=torch.float8_e4m3fn, per_tensor=per_tensor
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[..., K]`` to ``[..., N]``."""
        assert self.bias is not None
        x8, scale = quantize_rows(x)
        y = quant_linear_rows(x8, scale, self.weight, self.weight_scale, self.bias)
        return y.to(x.dtype)


class WeightOnlyLinear(_QuantLinearBase):
    """A linear layer whose weight alone is 8-bit; takes what :class:`torch.nn.Linear` takes."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, dtype=torch.uint8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[..., K]`` to ``[..., N]``."""
        return weight_only_linear(x, self.weight, self.weight_scale, self.bias)


class QuantAttentionOp(nn.Module):
    """Attention whose queries, keys, values and probabilities are e4m3, with static scales."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_scale = _frozen(dtype=torch.float32, fill=1)
        self.k_scale = _frozen(dtype=torch.float32, fill=1)
        self.v_scale = _frozen(dtype=torch.float32, fill=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``q`` ``[B, L, D]`` to ``k`` and ``v`` ``[B, n, D]``."""
        return quant_attention(
            q, k, v, self.q_scale, self.k_scale, self.v_scale, num_heads=self.num_heads
        )


class QuantEmbedding(nn.Module):
    """An embedding whose table is uint8, of which 128 is zero, with a scale for each row."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = _frozen(num_embeddings, embedding_dim, dtype=torch.uint8)
        self.weight_scale = _frozen(num_embeddings, dtype=torch.float32, fill=1)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids`` ``[...]``; return ``[..., D]`` in fp32. Only those rows are scaled."""
        # Both look-ups are an ``embedding``: indexing becomes a chain of nodes in ONNX.
        scale = F.embedding(ids, self.weight_scale.unsqueeze(-1))
        return (F.embedding(ids, self.weight).float() - UINT8.zero_point) * scale


def replace_linears(
    module: nn.Module,
    make: Callable[[str, nn.Linear], nn.Module | None],
    prefix: str = "",
) -> None:
    """Replace the linear layers inside ``module``.

    Args:
        module: changed in place.
        make: is given the full name and the layer, in the order of ``named_modules``, and returns
            what comes there; None keeps the layer.
        prefix: name of ``module`` itself, such as ``blocks.3.``, with its dot.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            new = make(f"{prefix}{name}", child)
            if new is not None:
                setattr(module, name, new)
        else:
            replace_linears(child, make, f"{prefix}{name}.")
