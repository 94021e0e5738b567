"""Roofline: profile each component, compare with measured peaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np

from wanx.benchmarks.speed.feeds import dit_feeds
from wanx.benchmarks.speed.metrics import stage_of, steady_steps
from wanx.benchmarks.speed.results import Results, Trial, with_problem
from wanx.benchmarks.speed.roofline.bounds import Roofline, roofline
from wanx.benchmarks.speed.roofline.ceilings import Ceilings, gpu_ceilings, processor_ceilings
from wanx.benchmarks.speed.roofline.cost import component_cost
from wanx.benchmarks.speed.roofline.profile import profile_component, profile_engines
from wanx.benchmarks.speed.suite import Suite
from wanx.bundle.reader import Bundle
from wanx.errors import EnvironmentMismatchError, WanxError
from wanx.progress import Progress, no_progress
from wanx.runtime.sampling.guidance import branches
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import State
from wanx.runtime.sessions.engine_session import EngineSession
from wanx.runtime.sessions.onnxruntime.providers import CPU
from wanx.runtime.sessions.registry import backend_of, provider_of
from wanx.runtime.sizes import latent_shape
from wanx.runtime.text import PromptTokenizer, clean_prompt
from wanx.runtime.tokens import token_grid


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfiledCall:
    """A component in a case.

    Attributes:
        component: its name.
        unit: what was timed.
        seconds: of that.
        runs: of the graph in that.
        sizes: of its dynamic axes.
        feeds: every input that is no state.
        state: for networks that have one.
    """

    component: str
    unit: str
    seconds: float
    runs: int
    sizes: Mapping[str, int]
    feeds: dict[str, Any]
    state: State | None = None


def require_packages() -> None:
    """Check that graphs can be read.

    Raises:
        EnvironmentMismatchError: the package onnx is missing.
    """
    if find_spec("onnx") is None:
        raise EnvironmentMismatchError(
            "counting operations needs onnx, which this environment lacks: pip install "
            "'wanx[report]', or use --no-roofline"
        )


def with_rooflines(
    results: Results, suite: Suite, *, operations: bool = False, progress: Progress = no_progress
) -> Results:
    """Measure the machine, profile each component, and compare both with what trials took.

    Args:
        results: of the trials.
        suite: that they are of.
        operations: whether to keep the most expensive operations.
        progress: told how many components are done.
    """
    rooflines: list[Roofline] = []
    measured: dict[bool, Ceilings | None] = {}
    todo = [
        (subject, case)
        for subject, described in enumerate(results.subjects)
        if described.peer is None
        for case in range(len(results.cases))
        if results.of(subject, case)
    ]
    for done, (subject, case) in enumerate(todo):
        progress("roofline", done, len(todo), "steps")
        bundle, label = suite.bundles[subject], results.subjects[subject].label
        on_gpu = backend_of(bundle.manifest.target, results.settings.provider).uses_gpu
        if on_gpu not in measured:
            threads = results.settings.threads
            measured[on_gpu] = gpu_ceilings() if on_gpu else processor_ceilings(threads)
        ceilings = measured[on_gpu]
        if ceilings is None:
            note = f"{label}: no roofline, since the GPU's limits are measured with PyTorch"
            results = replace(results, notes=(*results.notes, note))
            continue
        try:
            for call in _profiled_calls(results, bundle, subject, case):
                rooflines.append(
                    _roofline(call, bundle, ceilings, results, operations, subject, case)
                )
        except WanxError as error:
            results = with_problem(results, f"{label}, roofline: {error}")
    progress("roofline", len(todo), len(todo), "steps")
    return replace(results, rooflines=tuple(rooflines))


def _roofline(
    call: ProfiledCall,
    bundle: Bundle,
    ceilings: Ceilings,
    results: Results,
    operations: bool,
    subject: int,
    case: int,
) -> Roofline:
    costs = component_cost(bundle.held(bundle.graph_path(call.component)), call.sizes)
    threads, profile = results.settings.threads, None
    provider = provider_of(bundle.manifest, call.component, results.settings.provider)
    if provider == CPU:
        inputs = bundle.manifest.components[call.component].inputs
        held = {name: value for name, value in (call.state or {}).items() if name in inputs}
        profile = profile_component(bundle, call.component, call.feeds | held, threads=threads)
    elif provider is None and operations:
        with open_session(bundle, call.component, threads=threads) as session:
            if isinstance(session, EngineSession):
                profile = profile_engines(session, partial(session.run, call.feeds, call.state))
    return roofline(
        costs, ceilings, profile, runs=call.runs, seconds=call.seconds,
        with_operations=operations, subject=subject, case=case, component=call.component,
        unit=call.unit,
    )  # fmt: skip


def _profiled_calls(
    results: Results, bundle: Bundle, subject: int, number: int
) -> Iterator[ProfiledCall]:
    """The calls that every trial made; without the first frame, which is decoded only once."""
    case, trials = results.cases[number], results.of(subject, number)
    config, threads = bundle.manifest.config, results.settings.threads
    texts = _calls(trials, "text", 0)
    if texts:
        with bundle.names_in_errors():
            tokenizer = PromptTokenizer(bundle.held(bundle.tokenizer_path))
            ids, mask = tokenizer.encode(clean_prompt(case.prompt), config.dit.text_len)
        words = int(mask.sum())
        yield ProfiledCall(
            component="text_encoder", unit="prompt", seconds=median(texts), runs=1,
            sizes={"n": words}, feeds={"ids": np.ascontiguousarray(ids[:, :words])},
        )  # fmt: skip
    warm_up = results.settings.warm_up
    steps = [seconds for trial in trials for seconds in steady_steps(trial, warm_up)]
    shape = latent_shape(case.width, case.height, case.frames, config.vae)
    if steps:
        per_frame = token_grid((shape[0], 1, *shape[2:]), config.dit.patch_size)
        times = case.tokens // int(np.prod(per_frame))
        count = len(branches(case.guide_scale))
        feeds = dit_feeds(config, (times, *per_frame[1:]), count)
        yield ProfiledCall(
            component="dit", unit="denoising step", seconds=median(steps), runs=count,
            sizes={"L": case.tokens}, feeds=feeds.constants | feeds.branches[0],
        )  # fmt: skip
    frames = _calls(trials, "decode", 1)
    if len(frames) == len(trials) * (shape[1] - 1) > 0:  # whole frames, not tiles
        channels = config.vae.base_dim * config.vae.multipliers[-1]
        size = (1, channels, 1, *shape[2:])
        features = np.random.default_rng(0).standard_normal(size, np.float32)
        state: State = {}
        provider = results.settings.provider
        with open_session(
            bundle, "vae_decoder_up_first", threads=threads, provider=provider
        ) as session:
            session.run({"features": features}, state)
        yield ProfiledCall(
            component="vae_decoder_up_rest", unit="latent frame", seconds=median(frames), runs=1,
            sizes={"h": shape[2], "w": shape[3]}, feeds={"features": features}, state=state,
        )  # fmt: skip


def _calls(trials: list[Trial], stage: str, start: int) -> list[float]:
    """Seconds of a stage's calls, the prompt or all frames but the first."""
    stages = [stage_of(trial, stage) for trial in trials]
    end = 1 if stage == "text" else None
    return [
        seconds
        for stage_times in stages
        if stage_times is not None
        for seconds in stage_times.calls[start:end]
    ]
