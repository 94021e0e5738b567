"""Result of comparing two bundles, held against its gates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from wanx.accuracy.gates import Agreement, Gates, worst
from wanx.benchmarks.accuracy.clips import ClipComparison
from wanx.benchmarks.report.files import json_safe
from wanx.bundle.reader import Bundle
from wanx.bundle.record import printable
from wanx.config.number_formats import QUANTIZED
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.guidance import Branch
from wanx.version import __version__

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Agreement of both bundles in one run.

    Attributes:
        options: of the run.
        parts: agreement of every component but the DiT.
        steps: agreement of the velocity by step and branch, both bundles being fed the reference's
            latents and text.
        clip: None where clips were not asked for, or the candidate's is not finite.
        health: what is wrong with an output whatever it is compared with.
    """

    options: ResolvedRun
    parts: tuple[Agreement, ...]
    steps: tuple[Agreement, ...]
    clip: ClipComparison | None
    health: tuple[str, ...] = ()

    @property
    def branches(self) -> dict[Branch, tuple[Agreement, ...]]:
        """The steps of each branch."""
        names = dict.fromkeys(step.branch for step in self.steps)
        return {
            name: tuple(step for step in self.steps if step.branch == name)
            for name in names
            if name is not None
        }


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A compared bundle; ``hash`` covers every byte of it, ``folder`` is its last name."""

    name: str
    task: str
    precision: str
    target: str
    hash: str
    folder: str
    size_bytes: int

    @classmethod
    def of(cls, bundle: Bundle) -> Subject:
        """Describe a bundle."""
        manifest = bundle.manifest
        return cls(
            name=manifest.name,
            task=manifest.task,
            precision=manifest.precision,
            target=manifest.target,
            hash=bundle.hash,
            folder=printable(bundle.root.name),
            size_bytes=bundle.size_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The accuracy of a candidate bundle, measured against a reference bundle.

    Attributes:
        candidate: the bundle in question.
        reference: what it should do.
        gates: the least that passes.
        runs: one for each prompt.
        layers: SQNR in dB of the candidate's 8-bit layers on recorded inputs, by name.
        environment: machine and versions of tools.
    """

    candidate: Subject
    reference: Subject
    gates: Gates
    runs: tuple[RunComparison, ...]
    layers: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def layer_gate_db(self) -> float | None:
        """The least SQNR of a layer; None for a precision that has no 8-bit layers."""
        gates = {row.name: row.layer_gate_db for row in QUANTIZED}
        return gates.get(self.candidate.precision)

    @property
    def problems(self) -> list[str]:
        """Everything that fails, a line each."""
        problems = []
        for number, run in enumerate(self.runs, 1):
            problems += [f"run {number}: {problem}" for problem in run.health]
            problems += [f"run {number}: {problem}" for problem in self._failures(run)]
        gate = self.layer_gate_db
        if gate is not None:
            problems += [
                f"layer {name}: SQNR {value:.1f} dB is below {gate:g} dB"
                for name, value in self.layers.items()
                if not value >= gate
            ]
        return problems

    @property
    def passed(self) -> bool:
        """True where there is no problem."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels, as values that strict JSON has: null for what is not finite.

        Ratios are null where the floor is 0.
        """
        document = {
            "schema_version": SCHEMA_VERSION,
            "wanx_version": __version__,
            "passed": self.passed,
            "problems": self.problems,
            "candidate": asdict(self.candidate),
            "reference": asdict(self.reference),
            "gates": asdict(self.gates) | {"layer_sqnr_db": self.layer_gate_db},
            "runs": [_run_facts(run) for run in self.runs],
            "layers": dict(self.layers),
            "environment": dict(self.environment),
        }
        facts: dict[str, Any] = json_safe(document)
        return facts

    def _failures(self, run: RunComparison) -> Iterator[str]:
        """Failed gates of a run, one line for each component and branch."""
        groups = [[part] for part in run.parts] + [list(steps) for steps in run.branches.values()]
        for group in groups:
            gate = self.gates.of(group[0].component)
            bad = [item for item in group if not item.cosine >= gate]
            if not bad:
                continue
            least = worst(bad)
            at = f" at step {least.step} (timestep {least.timestep:g})" if least.step else ""
            count = f", at {len(bad)} of {len(group)} steps" if least.step else ""
            if math.isfinite(least.cosine):
                what = f"cosine {least.cosine:.5f} ({least.sqnr_db:.1f} dB) is below {gate:g}"
            else:
                what = "not finite"
            yield f"{least.output}: {what}{at}{count}"


def _run_facts(run: RunComparison) -> dict[str, Any]:
    clip = run.clip
    return {
        "options": asdict(run.options),
        "parts": [_without(asdict(part), "step", "timestep") for part in run.parts],
        "steps": [_without(asdict(step), "component") for step in run.steps],
        "clip": clip
        and {
            "candidate": asdict(clip.candidate),
            "floor": asdict(clip.ulp_baseline),
            "ratios": clip.ratios,
            "worst_frame": next((s.index for s in clip.stills if "worst" in s.label), None),
        },
        "health": list(run.health),
    }


def _without(facts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in names}
