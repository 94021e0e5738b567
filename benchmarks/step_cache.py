"""Step caches at equal savings: how near the result stays, and how much sooner it is there.

Run it as ``python -m benchmarks.step_cache BUNDLE --speedups 1.5 2 2.5``; the bundle has a table
of ``wanx build --calibrate-cache``. Runs start from the same noise as one with all forwards.
EasyCache gets the threshold with which it runs as few forwards, in the same runs; TeaCache and even
steps know theirs before. The error is that of the last latent, and of the guided velocity over all
steps. Then twenty random schedules of equal length: how well the predicted error ranks the measured
one (Spearman).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.builtin import open_named
from wanx.exporter.calibration.options import CalibrationOptions, planned_runs
from wanx.runtime.run_parts import EncodedRun, RunParts
from wanx.runtime.sampling.cache import teacache
from wanx.runtime.sampling.cache.base import ScheduledCache, StepCache
from wanx.runtime.sampling.cache.easy import EasyCache
from wanx.runtime.sampling.cache.search import MAX_GAP, best_steps
from wanx.runtime.sampling.cache.table import skipped_steps
from wanx.runtime.sessions.base import Session
from wanx.runtime.step_cache import step_table
from wanx.runtime.time_embedding import embed_timesteps

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Trajectory:
    """A run to its end: its last latent, guided velocities, forwards, and seconds."""

    latent: Array
    velocities: list[Array]
    forwards: int
    seconds: float


def run(session: Session, encoded: EncodedRun, cache: StepCache | None = None) -> Trajectory:
    """Denoise, with a step cache or without."""
    denoising = encoded.start(cache=cache)
    session.bind(denoising.constants)
    velocities, forwards, start = [], 0, time.perf_counter()
    while not denoising.done:
        feeds = denoising.feeds()
        outputs = session.run_each(list(feeds.values())) if feeds else []
        answers = {b: out["velocity"] for b, out in zip(feeds, outputs, strict=True)}
        velocities.append(denoising.apply_guidance(answers))
        forwards += len(answers)
        denoising.step(velocities[-1])
    return Trajectory(denoising.result, velocities, forwards, time.perf_counter() - start)


def relative(value: Array, reference: Array) -> float:
    """Relative error of an array."""
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def errors(found: Trajectory, full: Trajectory) -> tuple[float, float]:
    """Of the last latent, and of the velocity: the root of the mean square over the steps."""
    steps = zip(found.velocities, full.velocities, strict=True)
    squares = [relative(velocity, right) ** 2 for velocity, right in steps]
    return relative(found.latent, full.latent), float(np.sqrt(np.mean(squares)))


def easy_with(session: Session, encoded: EncodedRun, steps: int, most: int) -> Trajectory:
    """EasyCache with the lowest threshold, of some, that runs so few forwards."""
    for threshold in np.geomspace(0.01, 3, 24).tolist():
        found = run(session, encoded, EasyCache(steps, threshold))
        if found.forwards <= most:
            break
    return found


def random_schedules(steps: int, length: int, seed: int) -> list[tuple[int, ...]]:
    """Twenty schedules of so many computed steps, without longer gaps than are searched."""
    draw, found = random.Random(seed), []
    while len(found) < 20:
        chosen = (0, *sorted(draw.sample(range(1, steps), length - 1)))
        if max(np.diff((*chosen, steps))) <= MAX_GAP + 1:
            found.append(chosen)
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks."""
    first, second = (np.argsort(np.argsort(values)).astype(float) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, and the ranks."""
    bundle = open_named(arguments.bundle, verify="size")
    table = step_table(bundle)
    assert table is not None, "the bundle has no table; run wanx build --calibrate-cache"
    config = bundle.manifest.config
    # Behind those that the table was measured with.
    count = table.samples + arguments.prompts
    options = CalibrationOptions(prompts=count, steps=config.defaults.steps)
    runs = [
        (replace(one, seed=one.seed + 1000), inputs)
        for one, inputs in planned_runs(options, config)[-arguments.prompts :]
    ]
    parts = RunParts.of(bundle)
    encoded = parts.encode(runs)
    first = runs[0][0]
    steps, scales = first.steps, first.guidance.scales
    sampler = first.sampler()
    sigmas = [float(sigma) for sigma in sampler.sigmas[:-1]]
    costs, forwards = table.costs(sigmas, scales), [first.forwards // steps] * steps
    polynomial = teacache.coefficients(
        arguments.teacache or config.name, first.width * first.height
    )
    changes = None
    if polynomial is not None:
        changes = teacache.changes(embed_timesteps(bundle, sampler.timesteps), polynomial)
    rows, ranks = [], {}
    with parts.session("dit") as session:
        full = [run(session, one) for one in encoded]
        for speedup in arguments.speedups:
            budget = int(first.forwards / speedup + 1e-9)
            length = budget // forwards[0]
            ours, _ = best_steps(costs.cost, forwards, budget)
            even = sorted({round(i * steps / length) for i in range(length)})
            caches: dict[str, Any] = {
                "wanx": lambda c=ours: ScheduledCache(sigmas, c, costs.slopes(c)),
                "even steps": lambda c=even: ScheduledCache(sigmas, c),
                "EasyCache": None,
            }
            if changes is not None:
                tea = teacache.steps_within(changes, forwards, budget) or ()
                caches["TeaCache"] = lambda c=tea: ScheduledCache(sigmas, c)
            for name, make in caches.items():
                found, again = [], []
                for one in encoded:
                    again.append(run(session, one).seconds)
                    if make is None:
                        found.append(easy_with(session, one, steps, budget))
                    else:
                        found.append(run(session, one, make()))
                pairs = [errors(a, b) for a, b in zip(found, full, strict=True)]
                rows.append({
                    "speedup": speedup, "cache": name,
                    "forwards": float(np.mean([one.forwards for one in found])),
                    "latent_error": float(np.mean([pair[0] for pair in pairs])),
                    "velocity_error": float(np.mean([pair[1] for pair in pairs])),
                    "faster": float(np.median(again) / np.median([f.seconds for f in found])),
                })  # fmt: skip
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            predicted, latents, velocities = [], [], []
            for chosen in random_schedules(steps, length, 0):
                predicted.append(sum(costs.cost(*gap) for gap in skipped_steps(chosen, steps)))
                pairs = [
                    errors(
                        run(
                            session,
                            one,
                            ScheduledCache(sigmas, chosen, costs.slopes(chosen)),
                        ),
                        right,
                    )
                    for one, right in zip(encoded, full, strict=True)
                ]
                latents.append(float(np.mean([pair[0] for pair in pairs])))
                velocities.append(float(np.mean([pair[1] for pair in pairs])))
            ranks[str(speedup)] = {
                "latent": spearman(predicted, latents), "velocity": spearman(predicted, velocities),
            }  # fmt: skip
    return {"rows": rows, "spearman": ranks, "prompts": len(runs)}


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.5, 2.0, 2.5])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--teacache", help="take the published coefficients of this model")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
