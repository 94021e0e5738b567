"""Profile of a component by part of the model and by operation.

ONNX Runtime writes what each node took. It renames and fuses nodes, so they are found
by the part in the name that they were given (:mod:`wanx.benchmarks.speed.roofline.parts`) or by
what they compute.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanx.benchmarks.speed.roofline.parts import CONVOLUTIONS, REST, label_in, name_nodes, parts_of
from wanx.bundle.reader import Bundle
from wanx.files.hub_cache import without_links
from wanx.runtime.sessions.engine_session import EngineSession
from wanx.runtime.sessions.onnxruntime.loading import folds, session_options

OTHER = "other"
MOST_OPERATIONS = 10
_SUFFIX = "_kernel_time"
# Of nodes that fusion left without the name of a part.
_BY_OPERATION = {
    **dict.fromkeys(("FastGelu", "Gelu", "QuickGelu", "BiasGelu", "LayerNormalization"), REST),
    **dict.fromkeys(("Conv", "FusedConv"), CONVOLUTIONS),
}
_LEAST_SECONDS = 1.0
_MOST_RUNS = 5


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Time of the nodes of one kind, in one part and of one shape.

    Attributes:
        name: of the operation, as ONNX Runtime calls it.
        part: of the model.
        shapes: of its inputs.
        calls: nodes.
        share: of the time of all nodes.
    """

    name: str
    part: str
    shapes: str
    calls: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Shares of a component's time.

    Attributes:
        parts: share of the time of all nodes, by part; they add up to 1. Empty for engines.
        operations: the most expensive ones.
    """

    parts: Mapping[str, float]
    operations: tuple[Operation, ...]


def profile_component(
    bundle: Bundle, component: str, feeds: Mapping[str, Any], *, threads: int | None = None
) -> Profile:
    """Run a component under ONNX Runtime's profiler, some times after a warm-up.

    Args:
        bundle: an opened bundle that runs on the processor.
        component: such as ``dit``.
        feeds: every input of its graph; arrays or values of ONNX Runtime.
        threads: of the processor; None takes all cores.
    """
    import onnx
    import onnxruntime as ort

    record = bundle.manifest.components[component]
    model = onnx.load(
        bundle.held(record.engines.get("cpu", record.graph)), load_external_data=False
    )
    name_nodes(model, parts_of(model))
    root, data = without_links(bundle.held(""), model.SerializeToString())
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(root, threads=threads, graph=data)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = ort.InferenceSession(
            data,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=None if folds(record) else ["ConstantFolding"],
        )
        arrays = {n: v for n, v in feeds.items() if not isinstance(v, ort.OrtValue)}
        values = dict(feeds) | {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()
        }
        spent, runs = 0.0, 0
        while runs < 2 or (spent < _LEAST_SECONDS and runs < _MOST_RUNS):
            start = time.perf_counter()
            session.run_with_ort_values(None, values)
            spent, runs = spent + time.perf_counter() - start, runs + 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _read(events, runs)


def profile_engines(session: EngineSession, call: Callable[[], object], runs: int = 3) -> Profile:
    """Measure the kernels of a session on engines, after a warm-up.

    Args:
        session: that ``call`` runs.
        call: one run.
        runs: how often it is measured.

    Returns:
        Only the most expensive kernels: what is fused belongs to no single part of the model.
    """
    call()

    def repeat() -> None:
        for _ in range(runs):
            call()

    times = session.kernel_times(repeat)
    total = sum(time.seconds for time in times) or 1.0
    largest = sorted(times, key=lambda time: -time.seconds)[:MOST_OPERATIONS]
    return Profile(
        parts={},
        operations=tuple(
            Operation(
                name=time.name,
                part=time.program,
                shapes="",
                calls=round(time.calls / runs),
                share=time.seconds / total,
            )
            for time in largest
        ),
    )


def _read(events: Sequence[Mapping[str, Any]], runs: int) -> Profile:
    """Add up the events of all runs but the first."""
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    parts: dict[str, float] = defaultdict(float)
    operations: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event["name"].endswith(_SUFFIX) and event["ts"] >= starts[1]:
            part, arguments = _part(event), event["args"]
            parts[part] += event["dur"]
            shapes = " ".join(_shape(value) for value in arguments.get("input_type_shape", ()))
            operations[arguments["op_name"], part, shapes].append(event["dur"])
    total = sum(parts.values())
    largest = sorted(operations.items(), key=lambda item: -sum(item[1]))[:MOST_OPERATIONS]
    return Profile(
        parts={name: spent / total for name, spent in sorted(parts.items(), key=lambda i: -i[1])},
        operations=tuple(
            Operation(
                name=name,
                part=part,
                shapes=shapes,
                calls=round(len(spent) / (runs - 1)),
                share=sum(spent) / total,
            )
            for (name, part, shapes), spent in largest
        ),
    )


def _part(event: Mapping[str, Any]) -> str:
    part = label_in(event["name"].removesuffix(_SUFFIX))
    return part or _BY_OPERATION.get(event["args"]["op_name"], OTHER)


def _shape(value: Mapping[str, Sequence[int]]) -> str:
    return next("×".join(map(str, shape)) or "scalar" for shape in value.values())
