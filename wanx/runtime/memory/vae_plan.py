"""Plan of a part of the VAE for the memory that there is now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from wanx.bundle.manifest import Manifest
from wanx.runtime.available_memory import usable_memory
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.sessions.registry import device_memory
from wanx.runtime.vae.memory import VaeMemory, VaePlan
from wanx.runtime.vae.tiles import Tile

_log = logging.getLogger("wanx.runtime")


def plan_vae(
    manifest: Manifest,
    part: str,
    size: Sequence[int],
    *,
    memory: int | None = None,
    vram_budget: int | None = None,
    provider: str = AUTO,
    clips: int = 1,
    tile_area: int | None = None,
) -> VaePlan:
    """Plan whole frames where they fit, and else tiles; what does not fit gets the smallest.

    Args:
        manifest: of the bundle.
        part: that can be cut into tiles: ``vae_decoder_up`` or ``vae_encoder_down``.
        size: of the latent: frames, rows and columns.
        memory: bytes of the host that the process may take; None is what is free, which is looked
            at again before each tile.
        vram_budget: bytes of the GPU; None is what is free.
        provider: that was asked for.
        clips: that are encoded beside each other.
        tile_area: most latent places of a tile, whatever the memory.
    """
    times, height, width = size
    needs = VaeMemory(manifest, part, (times, height, width), provider, clips)
    if tile_area is not None:
        return needs.tiles(tile_area)
    if needs.on_gpu:
        budget = device_memory(manifest, vram_budget)
    else:
        budget = usable_memory() if memory is None else memory
    plan = needs.plan(budget)
    if budget is not None and plan.in_tiles:
        _log.info(
            "the VAE runs in %d tiles, %.2f times the work of whole frames, to fit into %.1f GB",
            len(plan.tiling.tiles), plan.tiling.overhead, budget / 1e9,
        )  # fmt: skip
    if needs.on_gpu or memory is not None or not needs.known:
        return plan

    def fits(tile: Tile) -> bool:
        free = usable_memory()
        return free is None or needs.values(tile.area) <= free

    return replace(plan, fits=fits)
