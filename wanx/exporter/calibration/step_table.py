"""Measuring of what skipping steps costs, on trajectories of a bundle's own networks.

Of each trajectory the inner products of its predictions are kept; of the first, some steps are
skipped alone, and the run goes on to its end, to see what an error does to the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from wanx.bundle.manifest import Manifest
from wanx.bundle.publish import add_engines, record_file
from wanx.bundle.reader import Bundle, open_bundle
from wanx.bundle.step_table import STEP_TABLE, weights_digest, write_step_table
from wanx.errors import UsageError
from wanx.exporter.calibration.options import CalibrationOptions, planned_runs
from wanx.progress import Progress, no_progress, step_counter
from wanx.runtime.denoise import DenoisingRun
from wanx.runtime.run_parts import EncodedRun, RunParts
from wanx.runtime.sampling.cache.base import ScheduledCache, StepCache, Velocities, log_snr
from wanx.runtime.sampling.cache.table import StepTable, TableRecorder, Trajectory
from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sampling.sampler import Float32, Float64

_PROBES = 10  # steps that are skipped alone
_PROBED = 4  # trajectories in which they are
_LEAST_GROWTH = 1e-3
_LEAST_ERROR = 1e-6


def measure_step_table(
    bundle: Bundle, options: CalibrationOptions, progress: Progress = no_progress
) -> StepTable:
    """Run the calibration's prompts with all steps of the model, and multiply their predictions.

    Args:
        bundle: that is measured.
        options: prompts and size; the steps are the model's own.
        progress: told how many steps are done.

    Raises:
        UsageError: the model was distilled to few steps, or lines of the file have noise levels of
            their own.
        WanxError: as a run.
    """
    config = bundle.manifest.config
    if config.defaults.preset is not None:
        raise UsageError(
            f"{bundle.root} runs by preset {config.defaults.preset}, whose steps are few: there is "
            "nothing to skip"
        )
    runs = planned_runs(replace(options, steps=config.defaults.steps), config)
    first, _ = runs[0]
    sampler = first.sampler()
    if any(not np.array_equal(run.sampler().sigmas, sampler.sigmas) for run, _ in runs):
        raise UsageError(
            "the prompts of the calibration have different noise levels; leave out solver, shift, "
            "preset, timesteps and sigmas"
        )
    sigmas = sampler.sigmas[:-1]
    recorder = TableRecorder(sigmas.tolist())
    parts = RunParts.of(bundle)
    encoded = parts.encode(runs)
    probes = _probes(first.steps)
    later = sum(first.steps - step - 1 for step in probes) * min(len(runs), _PROBED)
    count = step_counter(progress, "measure steps", len(runs) * first.steps + later)
    growth = np.zeros((len(probes), 0))
    with parts.session("dit") as session:
        for index, one in enumerate(encoded):
            recording = _Recording(recorder.trajectory(), one)
            result = parts.denoise(session, one.start(cache=recording), lambda *_: count())
            if index >= _PROBED:
                continue
            column = []
            for step in probes:
                skipped, error = recording.without(step, sigmas)
                after = parts.denoise(session, skipped, lambda *_: count())
                change = sigmas[step] - sampler.sigmas[step + 1]
                column.append(_relative(after, result) / max(error, _LEAST_ERROR) / change)
            growth = np.column_stack([growth, column])
    return recorder.table(_growth_by_step(sigmas, probes, growth))


class _Recording(StepCache):
    """A trajectory with its guided velocities, and the same with one step skipped."""

    def __init__(self, trajectory: Trajectory, encoded: EncodedRun) -> None:
        self._trajectory, self._encoded = trajectory, encoded
        self._latents: list[Float32] = []
        self.velocities: list[Float32] = []

    def skips(self, step: int, latent: Float32) -> bool:
        return False

    def predict(self, step: int, latent: Float32, branch: Branch) -> Float32:
        raise AssertionError("no step is skipped")

    def note(self, step: int, latent: Float32, velocities: Velocities) -> None:
        self._trajectory.note(step, latent, velocities)
        self._latents.append(latent)
        self.velocities.append(self._encoded.run.guidance.combine(step, velocities))

    def without(self, step: int, sigmas: Float64) -> tuple[DenoisingRun, float]:
        """A run behind a step whose velocity is predicted from the two before.

        Returns:
            The run, and the relative error of the velocity.
        """
        cache = ScheduledCache(sigmas.tolist(), range(step))
        denoising = self._encoded.start()
        for number in range(step):
            cache.note(number, self._latents[number], {"conditional": self.velocities[number]})
            denoising.step(self.velocities[number])
        predicted = cache.predict(step, self._latents[step], "conditional")
        denoising.step(predicted)
        return denoising, _relative(predicted, self.velocities[step])


def _probes(steps: int) -> list[int]:
    """Steps that are skipped alone: all but the first, or some evenly between."""
    return sorted({round(step) for step in np.linspace(1, steps - 1, min(_PROBES, steps - 1))})


def _relative(value: Float32, reference: Float32) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def _growth_by_step(sigmas: Float64, probes: Sequence[int], measured: Float64) -> Float64:
    """Growth at every step from that of the probes ``[probes, runs]``, by geometric means."""
    levels = [log_snr(float(sigma)) for sigma in sigmas]
    known = np.log(np.maximum(measured, _LEAST_GROWTH)).mean(axis=1)
    return np.asarray(np.exp(np.interp(levels, [levels[step] for step in probes], known)))


def store_step_table(table: StepTable, folder: Path, manifest: Manifest) -> Manifest:
    """Write a table into the folder of a bundle; returns the manifest that lists it."""
    arrays = {
        "sigmas": table.sigmas,
        "noise": table.noise,
        "velocity": table.velocity,
        "growth": table.growth,
    }
    write_step_table(folder / STEP_TABLE, arrays, table.samples, weights_digest(manifest))
    files = manifest.files | {STEP_TABLE: record_file(folder / STEP_TABLE)}
    return manifest.model_copy(update={"files": dict(sorted(files.items()))})


def add_step_table(
    bundle: Bundle, options: CalibrationOptions, progress: Progress = no_progress
) -> Bundle:
    """Measure a bundle and put the table into it.

    Raises:
        WanxError: as :func:`measure_step_table`, or the bundle cannot be written.
    """
    table = measure_step_table(bundle, options, progress)
    with add_engines(bundle) as (_, commit):
        commit(store_step_table(table, bundle.root, bundle.manifest))
    return open_bundle(bundle.root, verify="size")
