"""Result of comparing two bundles, held against its gates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from numpy.typing import NDArray

from wanx.accuracy.metrics import MAX_DB, cosine, sqnr_db
from wanx.benchmarks.accuracy.clips import ClipComparison
from wanx.benchmarks.report.files import json_safe
from wanx.bundle.reader import Bundle
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.guidance import Branch
from wanx.version import __version__

SCHEMA_VERSION = 1
# The least SQNR of a layer's output, in dB, by the precision of the bundle.
LAYER_GATES_DB: Mapping[str, float] = {"int8": 24.0, "fp8": 25.0}

_OUTPUTS = {
    "dit": "velocity",
    "text_encoder": "text features",
    "image_encoder": "image features",
    "vae_encoder": "encoded latents",
    "vae_decoder": "decoded frames",
}


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The least cosine that passes.

    Attributes:
        dit: of the velocity, at every step and branch.
        vae: of decoded frames and of encoded latents.
        text: of the features of each prompt.
        image_encoder: of the features of the images.
    """

    dit: float = 0.99
    vae: float = 0.999
    text: float = 0.98
    image_encoder: float = 0.98

    def of(self, component: str) -> float:
        """The gate of a component such as ``vae_decoder``."""
        if component.startswith("vae"):
            return self.vae
        gates = {"dit": self.dit, "text_encoder": self.text, "image_encoder": self.image_encoder}
        return gates[component]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close an output of the candidate is to the reference's, for the same input.

    Attributes:
        component: ``dit``, ``text_encoder``, ``image_encoder``, ``vae_encoder`` or ``vae_decoder``.
        branch: of guidance, where the component has one.
        step: of denoising, from 1, where the component is the DiT; 0 otherwise.
        timestep: what the DiT was fed at that step; 0 otherwise.
        cosine: see :func:`wanx.accuracy.metrics.cosine`; nan where an output is not finite.
        sqnr_db: see :func:`wanx.accuracy.metrics.sqnr_db`, likewise.
    """

    component: str
    branch: Branch | None = None
    step: int = 0
    timestep: float = 0.0
    cosine: float
    sqnr_db: float

    @property
    def equal(self) -> bool:
        """Whether the two are equal to the bit, or as good as that."""
        return self.sqnr_db >= MAX_DB

    @property
    def output(self) -> str:
        """What was compared, in words."""
        return _OUTPUTS[self.component] + (f", {self.branch}" if self.branch else "")


def agreement(candidate: NDArray[Any], reference: NDArray[Any], **where: Any) -> Agreement:
    """Compare two tensors of one shape; ``where`` are the other fields of :class:`Agreement`."""
    return Agreement(
        cosine=cosine(candidate, reference), sqnr_db=sqnr_db(candidate, reference), **where
    )


def worst(agreements: Sequence[Agreement]) -> Agreement:
    """The one of least cosine; what is not finite is worse than anything."""
    return min(agreements, key=lambda a: a.cosine if math.isfinite(a.cosine) else -math.inf)


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
            folder=bundle.root.name,
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
        return LAYER_GATES_DB.get(self.candidate.precision)

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
