"""The diffusion transformer of Wan2.1, from tokens to velocity.

It sees tokens only: patches, rotary tables and sizes are the caller's, so one traced graph serves
any resolution, aspect ratio and length. Residual stream, modulation, time embedding and head run
in fp32; linears and attention run in the dtype of their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanx.config import DiTConfig
from wanx.kernels.adaln import adaln
from wanx.kernels.attention import attention
from wanx.kernels.gated_residual import gated_residual
from wanx.kernels.rms_norm_rope import rms_norm_rope
from wanx.models.dit_embeddings import ImageEmbedding, TimeEmbedding, linear32
from wanx.models.text_encoder import RMSNorm


def rows(x: Tensor) -> list[Tensor]:
    """Cut ``[B, n, D]`` into n tensors ``[B, 1, D]``.

    Slices, because ``chunk`` becomes a sequence in ONNX, which few runtimes optimise.
    """
    return [x.narrow(1, i, 1) for i in range(x.shape[1])]


class Attend(nn.Module):
    """Attention of packed heads; a module, so that an 8-bit one can take its place."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``q`` ``[B, L, D]`` to ``k`` and ``v`` ``[B, n, D]``."""
        return attention(q, k, v, num_heads=self.num_heads)


class SelfAttention(nn.Module):
    """Self-attention with full-row RMS normalisation and 3-axis rotary embedding of q and k."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.attend = Attend(num_heads)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Transform ``x`` ``[B, L, D]``; ``rope`` is (cos, sin), each ``[L, d/2]``."""
        q, k = rms_norm_rope(
            self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, *rope,
            num_heads=self.num_heads, eps=self.eps,
        )  # fmt: skip
        out: Tensor = self.o(self.attend(q, k, self.v(x)))
        return out


class CrossAttention(nn.Module):
    """Attention to the text, plus a decoupled attention to image tokens where the task has them."""

    def __init__(self, dim: int, num_heads: int, eps: float, *, image: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        if image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """Transform ``x`` ``[B, L, D]`` by ``text`` ``[B, n, D]`` and ``image`` ``[B, m, D]``."""
        q = self.norm_q(self.q(x))
        y = attention(q, self.norm_k(self.k(text)), self.v(text), num_heads=self.num_heads)
        if image is not None:
            k = self.norm_k_img(self.k_img(image))
            y = y + attention(q, k, self.v_img(image), num_heads=self.num_heads)
        out: Tensor = self.o(y)
        return out


class FeedForward(nn.ModuleList):
    """Linear, tanh-GELU, linear; the parameters are at indices 0 and 2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__([nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[B, L, D]``."""
        for layer in self:
            x = layer(x)
        return x


class Block(nn.Module):
    """Self-attention, cross attention and feed-forward around one residual stream."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.eps = eps
        self.self_attn = SelfAttention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, heads, eps, image=config.image_dim is not None)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        # What the outputs of the two AdaLNs are divided by, where 8-bit layers read them.
        self.attn_smooth: nn.Parameter | None = None
        self.ffn_smooth: nn.Parameter | None = None

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        text: Tensor,
        image: Tensor | None,
    ) -> Tensor:
        """Transform ``x`` ``[B, L, D]`` under ``modulation`` ``[B, 6, D]``; both are fp32."""
        dtype = text.dtype
        modulation = self.modulation.float() + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows(modulation)
        y = adaln(x, *smoothed(scale, shift, self.attn_smooth), eps=self.eps).to(dtype)
        x = gated_residual(x, self.self_attn(y, rope), gate)
        y = F.layer_norm(
            x, x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps
        ).to(dtype)
        x = x + self.cross_attn(y, text, image).float()
        y = adaln(x, *smoothed(ffn_scale, ffn_shift, self.ffn_smooth), eps=self.eps).to(dtype)
        return gated_residual(x, self.ffn(y), ffn_gate)


def smoothed(scale: Tensor, shift: Tensor, vector: Tensor | None) -> tuple[Tensor, Tensor]:
    """Divide what an AdaLN will return by ``vector`` ``[D]``, in its modulation, at no cost."""
    if vector is None:
        return scale, shift
    return (1 + scale) / vector - 1, shift / vector


class VaceBlock(Block):
    """A block of the control branch, with the projections that tie it to the main one."""

    def __init__(self, config: DiTConfig, *, first: bool) -> None:
        super().__init__(config)
        self.before_proj = nn.Linear(config.dim, config.dim) if first else None
        self.after_proj = nn.Linear(config.dim, config.dim)


class Head(nn.Module):
    """Modulated norm and projection to the velocity, in fp32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.velocity_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Project ``x`` ``[B, L, D]`` under ``time`` ``[B, D]`` to ``[B, L, velocity_dim]``."""
        shift, scale = rows(self.modulation.float() + time.unsqueeze(1))
        return linear32(self.head, adaln(x, scale, shift, eps=self.eps))


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """What passes from block to block.

    Attributes:
        x: residual stream ``[B, L, D]`` in fp32.
        time: embedded timestep ``[B, D]`` in fp32.
        modulation: its projection ``[B, 6, D]`` in fp32.
        rope: (cos, sin), each ``[L, head_dim/2]`` in fp32.
        text: embedded text ``[B, n, D]`` in the dtype that linears run in.
        image: embedded images ``[B, m, D]`` in the same.
        control: residual stream of the control branch ``[B, L, D]`` in fp32.
        scale: weight of the hints ``[len(vace_layers)]``.
        hints: what the control branch adds to the main one, per block so far ``[B, L, D]``.
    """

    x: Tensor
    time: Tensor
    modulation: Tensor
    rope: tuple[Tensor, Tensor]
    text: Tensor
    image: Tensor | None
    control: Tensor | None
    scale: Tensor | None
    hints: tuple[Tensor, ...] = ()


class WanDiT(nn.Module):
    """Tokens, timestep and text to velocity.

    ``forward`` is :meth:`embed`, :meth:`advance_control` for each block of the control branch,
    :meth:`advance` for each block, and ``head``.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.token_dim, dim)
        self.text_embedding = nn.ModuleList(
            [nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)]
        )
        self.time_embedding = TimeEmbedding(config.freq_dim, dim)
        self.time_projection = nn.ModuleList([nn.SiLU(), nn.Linear(dim, dim * 6)])
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.image_dim is not None:
            positions = config.image_frames * config.image_tokens
            self.img_emb = ImageEmbedding(
                config.image_dim, dim, positions if config.image_frames > 1 else None
            )
        if config.vace_layers:
            self.vace_patch_embedding = nn.Linear(config.vace_in_dim * config.patch_volume, dim)
            self.vace_blocks = nn.ModuleList(
                VaceBlock(config, first=i == 0) for i in range(len(config.vace_layers))
            )

    def forward(
        self,
        tokens: Tensor,
        timestep: Tensor,
        context: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        image_context: Tensor | None = None,
        vace_tokens: Tensor | None = None,
        vace_scale: Tensor | None = None,
    ) -> Tensor:
        """Predict the flow velocity of ``tokens``.

        Args:
            tokens: Patches ``[B, L, token_dim]`` in fp32, features ordered (c, pt, ph, pw).
            timestep: ``[B]``, 1000·sigma.
            context: Text features ``[B, text_len, text_dim]``, zero-padded.
            rope_cos: ``[L, head_dim/2]`` in fp32.
            rope_sin: ``[L, head_dim/2]`` in fp32.
            image_context: CLIP features ``[B, image_frames·257, image_dim]``.
            vace_tokens: Control patches ``[B, L, 4·vace_in_dim]``.
            vace_scale: Weight of the hints, ``[len(vace_layers)]``.

        Returns:
            Velocity ``[B, L, velocity_dim]`` in fp32, features ordered (pt, ph, pw, c).
        """
        state = self.embed(
            tokens, timestep, context, rope_cos, rope_sin, image_context, vace_tokens, vace_scale
        )
        if state.control is not None:
            for index in range(len(self.vace_blocks)):
                state = self.advance_control(state, index)
        for index in range(len(self.blocks)):
            state = self.advance(state, index)
        out: Tensor = self.head(state.x, state.time)
        return out

    def embed(
        self,
        tokens: Tensor,
        timestep: Tensor,
        context: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        image_context: Tensor | None = None,
        vace_tokens: Tensor | None = None,
        vace_scale: Tensor | None = None,
    ) -> StreamState:
        """Take in the arguments of :meth:`forward`; reads no weight of a block or of the head."""
        dtype = self.text_embedding[0].weight.dtype
        time = self.time_embedding(timestep)
        modulation = linear32(self.time_projection[1], F.silu(time)).unflatten(1, (6, -1))
        text = context.to(dtype)
        for layer in self.text_embedding:
            text = layer(text)
        image = None if image_context is None else self.img_emb(image_context.to(dtype))
        x = self.patch_embedding(tokens.to(dtype)).float()
        control = None
        if vace_tokens is not None and vace_scale is not None:
            control = self.vace_patch_embedding(vace_tokens.to(dtype)).float()
        return StreamState(
            x=x, time=time, modulation=modulation, rope=(rope_cos, rope_sin), text=text,
            image=image, control=control, scale=vace_scale,
        )  # fmt: skip

    def advance_control(self, state: StreamState, index: int) -> StreamState:
        """Pass block ``index`` of the control branch, all of which come before the main blocks."""
        block, control, dtype = self.vace_blocks[index], state.control, state.text.dtype
        if block.before_proj is not None:
            control = block.before_proj(control.to(dtype)).float() + state.x
        control = block(control, state.modulation, state.rope, state.text, None)
        hint = block.after_proj(control.to(dtype)).float() * state.scale[index]
        return replace(state, control=control, hints=(*state.hints, hint))

    def advance(self, state: StreamState, index: int) -> StreamState:
        """Pass block ``index``, and add the hint that it receives."""
        x = self.blocks[index](state.x, state.modulation, state.rope, state.text, state.image)
        if state.hints and index in self.config.vace_layers:
            x = x + state.hints[self.config.vace_layers.index(index)]
        return replace(state, x=x)
