"""Transformers of Wan2.1 and sizes of its videos that are measured; tiny ones for rehearsals."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from wanx.config.models import PRESETS, DiTConfig


@dataclass(frozen=True, kw_only=True)
class Model:
    """A transformer.

    Attributes:
        name: in reports.
        config: its sizes.
    """

    name: str
    config: DiTConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """A video.

    Attributes:
        name: in reports.
        grid: tokens along time, height and width.
        blocks: how many blocks are timed; a step is scaled to all of them.
    """

    name: str
    grid: tuple[int, int, int]
    blocks: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return prod(self.grid)


MODELS = tuple(Model(name=name, config=PRESETS[f"t2v-{name}"].dit) for name in ("14B", "1.3B"))
# 81 frames.
SIZES = (
    Size(name="480P", grid=(21, 30, 52), blocks=2),
    Size(name="720P", grid=(21, 45, 80), blocks=1),
)
# On the processor: what runs is all that counts there.
REHEARSAL_MODEL = Model(
    name="tiny",
    config=DiTConfig(
        dim=64, ffn_dim=160, num_heads=2, num_layers=3, text_len=8, text_dim=48, freq_dim=32
    ),
)
REHEARSAL_SIZE = Size(name="480P", grid=(2, 3, 5), blocks=2)
PRECISIONS = ("bf16", "fp8", "fp8-attention")


def block_flops(config: DiTConfig, tokens: int) -> float:
    """Operations of one block for one branch, two for each multiplication; products alone."""
    dim, text = config.dim, config.text_len
    linears = 6 * dim * dim + 2 * dim * config.ffn_dim
    linears_of_text = 2 * dim * dim
    attention = 2 * dim * (tokens + text)
    return 2.0 * (tokens * (linears + attention) + text * linears_of_text)


def step_flops(config: DiTConfig, tokens: int) -> float:
    """Operations of the blocks for both branches of a step with guidance."""
    return 2 * config.num_layers * block_flops(config, tokens)
