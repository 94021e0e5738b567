"""Step cache of a run on a bundle: its table, or the published coefficients of its model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wanx.builtin import is_builtin
from wanx.bundle.reader import Bundle
from wanx.bundle.step_table import STEP_TABLE, read_step_table, weights_digest
from wanx.errors import UsageError
from wanx.runtime.denoise import DenoisingRun
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.cache import teacache
from wanx.runtime.sampling.cache.base import ScheduledCache, StepCache
from wanx.runtime.sampling.cache.easy import EasyCache
from wanx.runtime.sampling.cache.option import parse_cache
from wanx.runtime.sampling.cache.search import best_steps, fewest_forwards
from wanx.runtime.sampling.cache.table import StepTable
from wanx.runtime.time_embedding import embed_timesteps


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Step cache of a run.

    Attributes:
        source: ``table``, ``teacache`` or ``easy``.
        sigmas: noise levels of the steps.
        threshold: of EasyCache.
        computed: steps, from 0, at which the network runs; None where they are not known before.
        forwards: of the network in these steps.
        all_forwards: without a cache.
        slopes: weights of the predictions, by step; None extrapolates linearly.
        error: predicted relative error of the last latent; None where it is not known.
    """

    source: str
    sigmas: tuple[float, ...]
    threshold: float = 0.0
    computed: tuple[int, ...] | None = None
    forwards: int | None = None
    all_forwards: int
    slopes: Mapping[int, float] | None = None
    error: float | None = None

    @property
    def label(self) -> str:
        """Beside a progress bar."""
        if self.computed is None:
            return "EasyCache"
        return f"{len(self.sigmas) - len(self.computed)} steps predicted"

    @property
    def summary(self) -> str:
        """One line for the user."""
        if self.computed is None:
            return f"EasyCache with a threshold of {self.threshold:g} decides which steps run"
        ratio = self.all_forwards / (self.forwards or 1)
        saving = (
            f"{self.forwards} of {self.all_forwards} forwards run, {ratio:.3g} times fewer, and "
            "the others are predicted"
        )
        if self.error is None:
            return f"{saving} by TeaCache's published coefficients: their error is not known"
        return f"{saving}, with an error of {100 * self.error:.2g}% in the result"

    def start(self) -> StepCache:
        """Begin a run."""
        if self.computed is None:
            return EasyCache(len(self.sigmas), self.threshold)
        return ScheduledCache(self.sigmas, self.computed, self.slopes)


def plan_cache(bundle: Bundle, run: ResolvedRun) -> CachePlan | None:
    """Choose the steps to compute; None where the run has no cache.

    Raises:
        UsageError: the run allows no such saving, or nothing says what skipping costs.
        CorruptInputError: the bundle's table cannot be read.
    """
    option = parse_cache(run.cache)
    if option is None:
        return None
    sampler = run.sampler()
    sigmas = tuple(float(sigma) for sigma in sampler.sigmas[:-1])
    guidance = run.guidance
    forwards = [len(guidance.branches_at(step)) for step in range(run.steps)]
    total = sum(forwards)
    if option.speedup is None:
        return CachePlan(
            source="easy", sigmas=sigmas, threshold=option.threshold, all_forwards=total
        )
    # Steps of zero need no network, and nothing can be extrapolated from them.
    first = guidance.zero_steps
    budget = int(total / option.speedup + 1e-9)
    required = {step - first for step in guidance.required_steps}
    least = fewest_forwards(forwards[first:], required)
    if budget < least:
        raise UsageError(
            f"speedup is {option.speedup:g}; this run allows {total / least:.3g} at most"
        )
    table = step_table(bundle)
    error, slopes = None, None
    if table is not None:
        costs = table.costs(sigmas[first:], guidance.scales[first:])

        def cost(step: int, last: int, before: int | None) -> float:
            return math.inf if step in required else costs.cost(step, last, before)

        steps, squares = best_steps(cost, forwards[first:], budget)
        error = float(np.sqrt(squares))
        slopes = {first + step: slope for step, slope in costs.slopes(steps).items()}
    else:
        predicted = _published_changes(bundle, run, sampler.timesteps)[first:]
        found = teacache.steps_within(predicted, forwards[first:], budget, required)
        if found is None:
            raise UsageError(
                f"speedup is {option.speedup:g}, more than TeaCache's rule saves in this run"
            )
        steps = found
    computed = tuple(first + step for step in steps)
    return CachePlan(
        source="teacache" if table is None else "table", sigmas=sigmas, computed=computed,
        forwards=sum(forwards[step] for step in computed), all_forwards=total, error=error,
        slopes=slopes,
    )  # fmt: skip


def forward_facts(denoising: DenoisingRun, cache: CachePlan | None) -> dict[str, str]:
    """Forwards of a run for the video's metadata; nothing where there was no step cache."""
    if cache is None:
        return {}
    facts = {
        "forwards": f"{denoising.forwards} of {cache.all_forwards}",
        "cache_source": cache.source,
        "predicted_steps": ",".join(str(step + 1) for step in denoising.predicted),
    }
    return facts if cache.error is None else facts | {"predicted_error": f"{cache.error:.4g}"}


def step_table(bundle: Bundle) -> StepTable | None:
    """Table of a bundle; None where it has none.

    Raises:
        CorruptInputError: it cannot be read, or is another bundle's.
    """
    if STEP_TABLE not in bundle.manifest.files:
        return None
    with bundle.names_in_errors():
        arrays, samples = read_step_table(bundle.held(STEP_TABLE), weights_digest(bundle.manifest))
    return StepTable(**arrays, samples=samples)


def _published_changes(bundle: Bundle, run: ResolvedRun, timesteps: Sequence[float]) -> list[float]:
    manifest = bundle.manifest
    polynomial = teacache.coefficients(manifest.name, run.width * run.height)
    if polynomial is None:
        measure = f"wanx build {shlex.quote(str(bundle.root))}"
        if is_builtin(bundle.root):
            measure = f"wanx export {manifest.name} -o NEW"
        raise UsageError(
            f"nothing says what skipping steps of {manifest.name} costs; measure it with "
            f"`{measure} --calibrate-cache`, or take --cache easy"
        )
    return teacache.changes(embed_timesteps(bundle, timesteps), polynomial)
