"""Results of ``wanx bench`` as they are stored: ``report.json`` is a :class:`Results`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wanx.benchmarks.peers.agreement import PeerAgreement
from wanx.benchmarks.report.environment import environment
from wanx.benchmarks.speed.roofline.bounds import Roofline
from wanx.benchmarks.speed.sweep import Sweep
from wanx.bundle.reader import Bundle
from wanx.errors import CorruptInputError, UsageError
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.stages import Stage
from wanx.version import __version__

SCHEMA_VERSION = 1
KIND = "wanx bench"
Peer = Literal["diffusers", "diffusers-compiled"]


def pluralize(number: int, thing: str) -> str:
    """A number of things, such as ``1 frame`` or ``1,280 tokens``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A bundle, or a peer on its weights.

    Attributes:
        label: what the report calls it.
        peer: another implementation that ran on the weights of the bundle; None is wanx itself.
        name: of the model.
        task: of the model.
        precision: of the bundle.
        target: what the bundle runs on.
        hash: SHA-256 that covers every byte of the bundle, hex.
        size_bytes: of the bundle.
        engine_bytes: of its engines.
    """

    label: str
    peer: Peer | None = None
    name: str
    task: str
    precision: str
    target: str
    hash: str
    size_bytes: int
    engine_bytes: int

    @classmethod
    def of(cls, bundle: Bundle, label: str, peer: Peer | None = None) -> Subject:
        """Describe a bundle, or a peer on its weights."""
        manifest = bundle.manifest
        engines = (r.size for n, r in manifest.files.items() if n.startswith("engines/"))
        return cls(
            label=label,
            peer=peer,
            name=manifest.name,
            task=manifest.task,
            precision=manifest.precision,
            target=manifest.target,
            hash=bundle.hash,
            size_bytes=bundle.size_bytes,
            engine_bytes=sum(engines),
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One video that every subject makes.

    Attributes:
        width: pixels.
        height: pixels.
        frames: of the video.
        latent_frames: that are decoded.
        tokens: of the transformer.
        steps: of denoising.
        prompt: what the video shows.
        guide_scale: 1 is one forward a step, anything else two.
        shift: of the noise schedule.
        solver: of the noise schedule.
        seed: of the noise.
    """

    width: int
    height: int
    frames: int
    latent_frames: int
    tokens: int
    steps: int
    prompt: str
    guide_scale: float
    shift: float
    solver: str
    seed: int

    @property
    def label(self) -> str:
        """Such as ``832x480, 81 frames``."""
        return f"{self.width}x{self.height}, {pluralize(self.frames, 'frame')}"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory over the time of a trial, from its start; the largest value of each interval.

    Attributes:
        interval_seconds: between two values.
        host_bytes: resident memory of the process, mapped weights included; empty if unknown.
        device_bytes: of the GPU, beyond what was in use before; empty without one.
    """

    interval_seconds: float
    host_bytes: tuple[int, ...] = ()
    device_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One video, made by one subject in a process of its own.

    Attributes:
        subject: index in :attr:`Results.subjects`.
        case: index in :attr:`Results.cases`.
        round: from 0; in a round every subject makes every video once.
        cold_start_seconds: from starting the process to a pipeline that can be asked: Python,
            imports, opening the bundle and checking it.
        end_to_end_seconds: from starting the process to the finished file.
        stages: of the run.
        memory: over the time.
    """

    subject: int
    case: int
    round: int
    cold_start_seconds: float
    end_to_end_seconds: float
    stages: tuple[Stage, ...]
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a benchmark.

    Attributes:
        repeat: rounds that were asked for.
        warm_up: first steps of a trial that do not count as ``step``.
        baseline: index of the subject that others are compared with.
        threads: of the processor; None is all cores.
        provider: of ONNX Runtime; ``auto`` is the target's own.
    """

    repeat: int
    warm_up: int
    baseline: int
    threads: int | None
    provider: str = AUTO


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that was measured; a JSON document.

    Attributes:
        kind: tells this document from others.
        schema_version: of this document.
        wanx_version: that measured.
        created: ISO 8601, UTC.
        command: that makes these results again.
        environment: machine and versions.
        settings: how it was measured.
        subjects: what was measured.
        cases: the videos.
        trials: in the order in which they ran.
        rooflines: where the time of the parts goes.
        sweep: how a step grows with the number of tokens.
        agreements: how close peers come to the bundle whose weights they use.
        problems: why something that was asked for is missing; empty when all is there.
        notes: what this machine cannot tell.
    """

    kind: str = KIND
    schema_version: int = SCHEMA_VERSION
    wanx_version: str = __version__
    created: str
    command: str
    environment: Mapping[str, str] = field(default_factory=environment)
    settings: Settings
    subjects: tuple[Subject, ...]
    cases: tuple[Case, ...]
    trials: tuple[Trial, ...] = ()
    rooflines: tuple[Roofline, ...] = ()
    sweep: tuple[Sweep, ...] = ()
    agreements: tuple[PeerAgreement, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True where nothing is missing."""
        return not self.problems

    def of(self, subject: int, case: int) -> list[Trial]:
        """The trials of a subject and a case, by round."""
        return [t for t in self.trials if (t.subject, t.case) == (subject, case)]

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return asdict(self) | {"complete": self.complete}


def read_results(path: Path) -> Results:
    """Read a ``report.json``.

    Raises:
        UsageError: there is none, or it is of another schema version.
        CorruptInputError: it is not such a document.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; give a report.json") from None
    except ValueError:
        raise CorruptInputError(f"{path} is not JSON; give a report.json of wanx bench") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise CorruptInputError(f"{path} is not a report of wanx bench; give its report.json")
    if (written := document.get("schema_version")) != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {written}, this wanx reads {SCHEMA_VERSION}; measure "
            f"again, or use wanx {document.get('wanx_version', 'that wrote it')!s:.20}"
        )
    document.pop("complete", None)
    try:
        results: Results = TypeAdapter(Results).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptInputError(f"{path}: {where}: {first['msg']}; measure again") from None
    return results


def with_problem(results: Results, problem: str) -> Results:
    """The results with one more reason why they are not complete."""
    return replace(results, problems=(*results.problems, problem))
