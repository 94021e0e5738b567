"""The diffusion transformer of Wan2.1, from tokens to velocity.

It sees tokens only: patches, rotary tables and sizes are the caller's, so one traced graph serves
any resolution, aspect ratio and length. Residual stream, modulation, time embedding and head run
in fp32; linears and attention run in the dtype of their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from wanx.config.models import DiTConfig
from wanx.models.dit.block import Block, Head, VaceBlock
from wanx.models.dit.embeddings import ImageEmbedding, TimeEmbedding, linear_fp32


@dataclass(frozen=True, kw_only=True)
class DiTState:
    """Values that pass from block to block.

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

    ``forward`` is :meth:`embed`, :meth:`run_control_block` for each block of the control branch,
    :meth:`run_block` for each block, and ``head``.
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
                state = self.run_control_block(state, index)
        for index in range(len(self.blocks)):
            state = self.run_block(state, index)
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
    ) -> DiTState:
        """Take in the arguments of :meth:`forward`; reads no weight of a block or of the head."""
        dtype = self.text_embedding[0].weight.dtype
        time = self.time_embedding(timestep)
        modulation = linear_fp32(self.time_projection[1], F.silu(time)).unflatten(1, (6, -1))
        text = context.to(dtype)
        for layer in self.text_embedding:
            text = layer(text)
        image = None if image_context is None else self.img_emb(image_context.to(dtype))
        x = self.patch_embedding(tokens.to(dtype)).float()
        control = None
        if vace_tokens is not None and vace_scale is not None:
            control = self.vace_patch_embedding(vace_tokens.to(dtype)).float()
        return DiTState(
            x=x, time=time, modulation=modulation, rope=(rope_cos, rope_sin), text=text,
            image=image, control=control, scale=vace_scale,
        )  # fmt: skip

    def run_control_block(self, state: DiTState, index: int) -> DiTState:
        """Pass block ``index`` of the control branch, all of which come before the main blocks."""
        block, control, dtype = self.vace_blocks[index], state.control, state.text.dtype
        if block.before_proj is not None:
            control = block.before_proj(control.to(dtype)).float() + state.x
        control = block(control, state.modulation, state.rope, state.text, None)
        hint = block.after_proj(control.to(dtype)).float() * state.scale[index]
        return replace(state, control=control, hints=(*state.hints, hint))

    def run_block(self, state: DiTState, index: int) -> DiTState:
        """Pass block ``index``, and add the hint that it receives."""
        x = self.blocks[index](state.x, state.modulation, state.rope, state.text, state.image)
        if state.hints and index in self.config.vace_layers:
            x = x + state.hints[self.config.vace_layers.index(index)]
        return replace(state, x=x)
