"""Denoising runs over the source weights, in which the inputs of every linear are observed.

All runs advance in lockstep, so that each block's weights are read once a step for all of them, and
are in memory alone. Everything is saved after each step; an interrupted calibration goes on there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from wanx.bundle.golden_steps import Golden, GoldenStep
from wanx.bundle.reader import Bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.exporter.calibration.blockwise_dit import BlockwiseDiT
from wanx.exporter.calibration.observers import Observers
from wanx.exporter.calibration.options import (
    CalibrationOptions,
    PlannedRuns,
    golden_only,
    planned_runs,
)
from wanx.exporter.calibration.state import Calibration, state_path
from wanx.progress import Progress, no_progress
from wanx.runtime.denoise import DenoisingRun
from wanx.runtime.options import ResolvedRun
from wanx.runtime.run_parts import RunParts
from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sessions.onnxruntime.providers import CPU

Float32 = NDArray[np.float32]


def calibrate(
    checkpoint: Checkpoint,
    bundle: Bundle,
    options: CalibrationOptions,
    observed_inputs: Iterable[str] = (),
    progress: Progress = no_progress,
    runs: PlannedRuns | None = None,
) -> Calibration:
    """Run denoising over a checkpoint, observing ``observed_inputs``.

    Args:
        checkpoint: whose source weights run, one block in memory at a time.
        bundle: has every other component, and the tokenizer.
        options: what to run.
        observed_inputs: names of linears, such as ``blocks.3.ffn.2``, and of attentions, such as
            ``blocks.3.self_attn.attend``, whose inputs become ``….q``, ``….k`` and ``….v``. Where
            there are none, nothing is saved.
        progress: told how many blocks are done.
        runs: planned from the options before; None plans them.

    Raises:
        UsageError: the calibration file or an option cannot be.
        WanxError: an activation is not finite; the message names the layer.
    """
    config, observed = checkpoint.config, sorted(observed_inputs)
    if runs is None:
        runs = planned_runs(options, config)
    key_parts = (*observed, options.golden_steps)
    path = state_path(checkpoint, bundle, runs, key_parts) if observed else None
    trajectories = [encoded.start() for encoded in RunParts.of(bundle, provider=CPU).encode(runs)]
    if path is not None and options.fresh:
        path.unlink(missing_ok=True)
    state = Calibration.load(path, len(runs))
    for trajectory, velocities in zip(trajectories, state.history, strict=True):
        for velocity in velocities:
            trajectory.step(velocity)
    dit = BlockwiseDiT(config.dit, checkpoint.components["dit"].tensors)
    recorded_steps = golden_numbers(trajectories[0].steps, options.golden_steps)
    blocks = config.dit.num_layers + len(config.dit.vace_layers)
    hooks = observer_hooks(state.observers, observed)
    first = trajectories[0]
    while not first.done:
        done = first.steps_done * blocks

        def on_block(count: int, _: int, done: int = done) -> None:
            stage = "calibrate" if observed else "golden steps"
            progress(stage, done + count, first.steps * blocks, "steps")

        answers = _answers(dit, trajectories, hooks, on_block)
        if first.steps_done + 1 in recorded_steps:
            state.golden = _with_step(state.golden, runs[0][0], first, answers[0])
        for trajectory, answer, velocities in zip(
            trajectories, answers, state.history, strict=True
        ):
            velocities.append(trajectory.apply_guidance(answer))
            trajectory.step(velocities[-1])
        state.save()
    return state


def record_golden(
    checkpoint: Checkpoint,
    bundle: Bundle,
    options: CalibrationOptions,
    progress: Progress = no_progress,
    runs: PlannedRuns | None = None,
) -> Golden:
    """Run one short trajectory of ``golden_steps`` steps over a checkpoint, and keep all of it.

    Args:
        checkpoint: whose source weights run, one block in memory at a time.
        bundle: has every other component, and the tokenizer.
        options: the first prompt and the size count.
        progress: told how many blocks are done.
        runs: planned with :func:`golden_only` before; None plans them.

    Raises:
        UsageError, WanxError: as :func:`calibrate`.
    """
    golden = calibrate(checkpoint, bundle, golden_only(options), (), progress, runs).golden
    assert golden is not None, "golden_steps is 0"
    return golden


def golden_numbers(steps: int, count: int) -> set[int]:
    """Numbers, from 1, of ``count`` steps to record: the first, the last, and evenly between."""
    return {round(number) for number in np.linspace(1, steps, min(count, steps))}


def _answers(
    dit: BlockwiseDiT,
    trajectories: Sequence[DenoisingRun],
    hooks: Callable[[nn.Module, str], AbstractContextManager[None]],
    on_block: Callable[[int, int], None],
) -> list[dict[Branch, Float32]]:
    """Velocities of the coming step of every trajectory, per branch."""
    jobs = [
        (index, branch, feeds | trajectory.constants)
        for index, trajectory in enumerate(trajectories)
        for branch, feeds in trajectory.feeds().items()
    ]
    results = dit.run([feeds for _, _, feeds in jobs], watch=hooks, on_block=on_block)
    answers: list[dict[Branch, Float32]] = [{} for _ in trajectories]
    for (index, branch, _), velocity in zip(jobs, results, strict=True):
        answers[index][branch] = velocity
    return answers


def observer_hooks(
    observers: Observers, observed_inputs: Iterable[str]
) -> Callable[[nn.Module, str], AbstractContextManager[None]]:
    """Make a context manager that hooks observers onto the inputs of one block."""
    names = frozenset(observed_inputs)

    @contextmanager
    def hook(block: nn.Module, name: str) -> Iterator[None]:
        with ExitStack() as hooks:
            for child, module in block.named_modules():
                input_name = f"{name}.{child}"
                if input_name in names:
                    handle = module.register_forward_pre_hook(_hook(observers, input_name))
                    hooks.callback(handle.remove)
            yield

    return hook


def _hook(observers: Observers, input_name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Linear):
            observers.observe(input_name, inputs[0])
        else:
            for letter, value in zip("qkv", inputs, strict=True):
                observers.observe(f"{input_name}.{letter}", value)

    return observe


def _with_step(
    golden: Golden | None,
    run: ResolvedRun,
    trajectory: DenoisingRun,
    answer: Mapping[Branch, Float32],
) -> Golden:
    feeds = trajectory.feeds()
    shared = next(iter(feeds.values()))
    step = GoldenStep(
        step=trajectory.steps_done + 1,
        tokens=shared["tokens"],
        timestep=shared["timestep"],
        velocities=dict(answer.items()),
    )
    if golden is not None:
        return replace(golden, steps=(*golden.steps, step))
    return Golden(
        run={name: str(value) for name, value in asdict(run).items() if value is not None},
        constants=trajectory.constants,
        contexts={branch: value["context"] for branch, value in feeds.items()},
        steps=(step,),
    )
