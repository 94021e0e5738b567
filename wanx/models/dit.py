"""The diffusion transformer of Wan2.1, from tokens to velocity.

It sees tokens only: patches, rotary tables and sizes are the caller's, so one traced graph serves
any resolution, aspect ratio and length. Residual stream, modulation, time embedding and head run
in fp32; linears and attention run in the dtype of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanx.config import DiTConfig
from wanx.kernels.adaln import adaln
from wanx.kernels.attention import attention
from wanx.kernels.gated_residual import gated_residual
from wanx.kernels.rms_norm_rope import rms_norm_rope
from wanx.models.text_encoder import RMSNorm


def rows(x: Tensor) -> list[Tensor]:
    """Cut ``[B, n, D]`` into n tensors ``[B, 1, D]``.

    Slices, because ``chunk`` becomes a sequence in ONNX, which few runtimes optimise.
    """
    return [x[:, i : i + 1] for i in range(x.shape[1])]


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Transform ``x`` ``[B, L, D]``; ``rope`` is (cos, sin), each ``[L, d/2]``."""
        q, k = rms_norm_rope(
            self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, *rope,
            num_heads=self.num_heads, eps=self.eps,
        )  # fmt: skip
        out: Tensor = self.o(attention(q, k, self.v(x), num_heads=self.num_heads))
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
        y = adaln(x, scale, shift, eps=self.eps).to(dtype)
        x = gated_residual(x, self.self_attn(y, rope), gate)
        y = F.layer_norm(
            x, x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps
        ).to(dtype)
        x = x + self.cross_attn(y, text, image).float()
        y = adaln(x, ffn_scale, ffn_shift, eps=self.eps).to(dtype)
        return gated_residual(x, self.ffn(y), ffn_gate)


class VaceBlock(Block):
    """A block of the control branch, with the projections that tie it to the main one."""

    def __init__(self, config: DiTConfig, *, first: bool) -> None:
        super().__init__(config)
        self.before_proj = nn.Linear(config.dim, config.dim) if first else None
        self.after_proj = nn.Linear(config.dim, config.dim)


class TimeEmbedding(nn.ModuleList):
    """Sinusoids of the timestep through Linear, SiLU, Linear; all in fp32."""

    high: Tensor
    low: Tensor

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__([nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)])
        half = freq_dim // 2
        # Constants name their device, so that they are real where the weights are not.
        steps = torch.arange(half, dtype=torch.float64, device="cpu")
        frequency = torch.pow(10000.0, -steps / half)
        # The angle t·f reaches 1000 rad, where fp32 products lose four digits of the sine. With f
        # cut into a 12-bit head and a tail, t·head is exact for whole t up to 4095.
        head = (frequency * 4096).round() / 4096
        self.register_buffer("high", head.float(), persistent=False)
        self.register_buffer("low", (frequency - head).float(), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed ``timestep`` ``[B]`` (fp32, 0…1000) to ``[B, D]`` in fp32."""
        t = timestep.float()[:, None]
        a, b = t * self.high, t * self.low
        cos = a.cos() * b.cos() - a.sin() * b.sin()
        sin = a.sin() * b.cos() + a.cos() * b.sin()
        first, _, last = self
        hidden = _linear32(first, torch.cat([cos, sin], dim=-1))
        return _linear32(last, F.silu(hidden))


class ImageEmbedding(nn.Module):
    """CLIP features to the width of the model: norm, Linear, GELU, Linear, norm."""

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.proj = nn.ModuleList(
            [
                nn.LayerNorm(image_dim),
                nn.Linear(image_dim, image_dim),
                nn.GELU(),
                nn.Linear(image_dim, dim),
                nn.LayerNorm(dim),
            ]
        )
        if positions is not None:
            self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Embed ``x`` ``[B, tokens, image_dim]``."""
        if hasattr(self, "emb_pos"):
            x = x + self.emb_pos
        for layer in self.proj:
            x = layer(x)
        return x


class Head(nn.Module):
    """Modulated norm and projection to the velocity, in fp32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.velocity_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Project ``x`` ``[B, L, D]`` under ``time`` ``[B, D]`` to ``[B, L, velocity_dim]``."""
        shift, scale = rows(self.modulation.float() + time[:, None])
        return _linear32(self.head, adaln(x, scale, shift, eps=self.eps))


class WanDiT(nn.Module):
    """Tokens, timestep and text to velocity."""

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
        dtype = self.blocks[0].self_attn.q.weight.dtype
        rope = (rope_cos, rope_sin)
        time = self.time_embedding(timestep)
        modulation = _linear32(self.time_projection[1], F.silu(time)).unflatten(1, (6, -1))
        text = context.to(dtype)
        for layer in self.text_embedding:
            text = layer(text)
        image = None if image_context is None else self.img_emb(image_context.to(dtype))
        x = self.patch_embedding(tokens.to(dtype)).float()
        hints: Sequence[Tensor] = ()
        if vace_tokens is not None and vace_scale is not None:
            control = self.vace_patch_embedding(vace_tokens.to(dtype)).float()
            hints = self._hints(x, control, vace_scale, modulation, rope, text)
        for index, block in enumerate(self.blocks):
            x = block(x, modulation, rope, text, image)
            if hints and index in self.config.vace_layers:
                x = x + hints[self.config.vace_layers.index(index)]
        out: Tensor = self.head(x, time)
        return out

    def _hints(
        self,
        x: Tensor,
        control: Tensor,
        scale: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        text: Tensor,
    ) -> list[Tensor]:
        hints = []
        for index, block in enumerate(self.vace_blocks):
            if block.before_proj is not None:
                control = block.before_proj(control.to(text.dtype)).float() + x
            control = block(control, modulation, rope, text, None)
            hints.append(block.after_proj(control.to(text.dtype)).float() * scale[index])
        return hints


def _linear32(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.float(), linear.weight.float(), linear.bias.float())
