"""Memory that the VAE takes for a size of tiles, and the tiles that fit into what there is.

The law of a graph's values is the export's (:class:`wanx.bundle.manifest.ActivationBytes`); what
providers take beyond it was measured: see docs/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from wanx.bundle.manifest import Manifest
from wanx.runtime.sessions.onnxruntime.providers import AUTO, CPU
from wanx.runtime.sessions.registry import provider_of
from wanx.runtime.vae.tiles import Tile, Tiling, plan_tiles, smallest_area, whole

PROCESS = 200 << 20  # Python, the libraries, and the threads' stacks


@dataclass(frozen=True)
class _Takes:
    """Memory of a provider: a multiple of the weights' files, and one of the values."""

    weights: float
    values: float


# Engines, which hold the old and the new state at once. What they take has not been measured.
_GPU = "gpu"
# Whole frames: one graph at a time. ONNX Runtime's arena grows by doubling.
_WHOLE = {CPU: _Takes(1, 2.0), "openvino": _Takes(4, 4.5), _GPU: _Takes(1, 1.8)}
# Tiles: both graphs at a time. Without an arena, the values take what they are.
_TILES = {CPU: _Takes(2, 1.08), "openvino": _Takes(8, 4.5), _GPU: _Takes(2, 2.4)}


@dataclass(frozen=True, kw_only=True)
class VaePlan:
    """Plan of a part of the VAE.

    Attributes:
        tiling: of the frames.
        provider: of ONNX Runtime; None leaves it to the target.
        bytes: that it takes of the memory that it runs in, weights included; None where that is
            not known.
        weights: of these; on the processor they are mapped from files.
        leaves_preferred: whether the provider is another than the target's, which takes more.
        arena: whether memory is kept from call to call, which is faster.
        fits: whether a tile fits into what is free when its turn comes.
    """

    tiling: Tiling
    provider: str | None = None
    bytes: int | None = None
    weights: int = 0
    leaves_preferred: bool = False
    arena: bool = True
    fits: Callable[[Tile], bool] = lambda tile: True

    @property
    def in_tiles(self) -> bool:
        """Whether there are several tiles."""
        return len(self.tiling.tiles) > 1


class VaeMemory:
    """Memory of one direction of the VAE for latents of one size.

    Attributes:
        border: in latent rows and columns, that tiles need.
        on_gpu: whether the memory is a GPU's.
    """

    def __init__(
        self,
        manifest: Manifest,
        part: str,
        size: tuple[int, int, int],
        provider: str = AUTO,
        clips: int = 1,
    ) -> None:
        """Read the laws of a part.

        Args:
            manifest: of the bundle.
            part: that can be cut into tiles: ``vae_decoder_up`` or ``vae_encoder_down``.
            size: latent frames, rows and columns.
            provider: that was asked for.
            clips: that are encoded beside each other.
        """
        first, rest = (manifest.components[f"{part}_{chunk}"] for chunk in ("first", "rest"))
        times, self._height, self._width = size
        self.border = rest.tile_border or 0
        self._laws = [law for r in (first, rest) if (law := r.activation_bytes) is not None]
        self._weights = sum(manifest.files[name].size for name in rest.weights)
        vae = manifest.config.vae
        features = 4 * vae.base_dim * vae.multipliers[-1] * times
        video = 3 * (1 + vae.temporal_stride * (times - 1)) * vae.spatial_stride**2
        # The pixels are joined at the end, if no file takes them.
        self._kept = clips * self._height * self._width * (features + 2 * video)
        self._clips = clips
        preferred = provider_of(manifest, f"{part}_rest", provider)
        kind = _GPU if preferred is None else preferred
        self._providers = [kind] if kind in _WHOLE else []
        self.on_gpu = kind == _GPU
        if self.on_gpu:
            self._kept = 0
        if provider == AUTO and preferred == "openvino":
            self._providers.append(CPU)

    @property
    def known(self) -> bool:
        """Whether the memory is known."""
        return bool(self._providers) and len(self._laws) == 2

    def whole(self, provider: str | None = None) -> VaePlan:
        """Plan without tiles."""
        frames = whole(self._height, self._width)
        provider = provider or next(iter(self._providers), None)
        if not self.known:
            return VaePlan(tiling=frames)
        assert provider is not None
        places = self._height * self._width
        return VaePlan(
            tiling=frames,
            provider=provider,
            bytes=PROCESS + self._kept + self._bytes(_WHOLE[provider], self._clips * places),
            weights=self._weights,
            leaves_preferred=provider != self._providers[0],
        )

    def tiles(self, area: int) -> VaePlan:
        """Plan with tiles of a number of places at most."""
        tiling = plan_tiles(self._height, self._width, self.border, area)
        if not self.known:
            return VaePlan(tiling=tiling)
        provider = self._providers[-1]
        return VaePlan(
            tiling=tiling,
            provider=provider,
            bytes=self.tile_bytes(tiling.area),
            weights=2 * self._weights,
            arena=False,
            leaves_preferred=provider != self._providers[0],
        )

    def plan(self, budget: int | None) -> VaePlan:
        """Plan that fits a budget of bytes, or takes the least; whole frames without a budget."""
        if budget is None or not self.known:
            return self.whole()
        return self.fitting(budget) or self.smallest()

    def smallest(self) -> VaePlan:
        """Plan that takes the least memory."""
        plans = [self.whole(provider) for provider in self._providers]
        plans.append(self.tiles(smallest_area(self._height, self._width, self.border)))
        return min(plans, key=lambda plan: plan.bytes or 0)

    def fitting(self, budget: int) -> VaePlan | None:
        """Plan that fits a budget of bytes and recomputes least; None where none does."""
        for provider in self._providers:
            plan = self.whole(provider)
            assert plan.bytes is not None
            if plan.bytes <= budget:
                return plan
        low = smallest_area(self._height, self._width, self.border)
        high = self._height * self._width
        if self.tile_bytes(low) > budget:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if self.tile_bytes(middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return self.tiles(low)

    def tile_bytes(self, area: int) -> int:
        """Memory with tiles of a number of places, of which one is computed at a time."""
        whole = area >= self._height * self._width
        places = area * (self._clips if whole else 1)  # tiles take one clip after the other
        return PROCESS + self._kept + self._bytes(_TILES[self._providers[-1]], places)

    def values(self, area: int) -> int:
        """Memory of the values of a tile of a number of places."""
        return self._bytes(_Takes(0, _TILES[self._providers[-1]].values), area)

    def _bytes(self, takes: _Takes, places: int) -> int:
        values = max(law.fixed + law.each * places for law in self._laws)
        return math.ceil(takes.weights * self._weights + takes.values * values)
