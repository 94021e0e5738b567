"""The targets ``rtx`` and ``tensorrt``: engines of the segments of each component.

Both flavours of TensorRT share this code; what one of them lacks is found by looking. TensorRT-RTX
builds for GPUs that this machine need not have.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from wanx.bundle.engine_schedule import PLAN, Plan, Program
from wanx.errors import WanxError
from wanx.exporter.components import ComponentSpec
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.segments import Segment
from wanx.exporter.targets.tensorrt import worker
from wanx.exporter.targets.tensorrt.flavour import Flavour
from wanx.exporter.targets.tensorrt.graph import segment_graph
from wanx.exporter.targets.tensorrt.ranges import Range
from wanx.exporter.targets.tensorrt.tuning import BY_ITSELF, Tuning
from wanx.exporter.targets.tensorrt.worker import DISK_FULL, REQUEST
from wanx.interruption import cleanup_on_sigint
from wanx.models.quantized import DynamicQuantLinear, QuantAttentionOp, QuantLinear
from wanx.runtime.sessions.tensorrt.library import MODULES

_EIGHT_BIT = (QuantLinear, DynamicQuantLinear)  # weight and input


def build(
    spec: ComponentSpec,
    dtype: torch.dtype,
    flavour: Flavour,
    ranges: Mapping[str, Range],
    folder: Path,
    plugins: Collection[str] = (),
    tuning: Tuning = BY_ITSELF,
    tell: Callable[[float], None] = lambda done: None,
) -> Plan:
    """Build the engines of a component.

    Args:
        spec: as it is, or with 8-bit layers.
        dtype: that it computes in.
        flavour: which TensorRT, and for which GPUs.
        ranges: of each dynamic axis.
        folder: a new one for the engines and the plan.
        plugins: functions that our kernels run, as :func:`parse_plugins` reads them.
        tuning: options of the builder.
        tell: told how much is done, from 0 to 1.

    Raises:
        EnvironmentMismatchError: this TensorRT is not installed.
        OSError: the disk is full.
        WanxError: an engine does not build, or is not what was asked for.
    """
    flavour.module()
    parts = partition(spec, dtype)
    folder.mkdir(parents=True)
    programs = {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        for segment_name, segment in parts.segments.items():
            graph = segment_graph(segment, parts.axes, plugins=plugins, sms=flavour.sms)
            (place / f"{segment_name}.onnx").write_bytes(graph.SerializeToString())
        jobs = {n: shapes_of(segment, ranges) for n, segment in parts.segments.items()}
        request = {
            "module": MODULES[flavour.target], "sms": flavour.sms, "newer": flavour.newer,
            "plugins": bool(plugins), "tuning": asdict(tuning), "jobs": jobs,
        }  # fmt: skip
        words = _work(place, request, tell)
        for segment_name, segment in parts.segments.items():
            try:
                layers = count_layers(_result(place / f"{segment_name}.json", words))
                require_layers(segment, layers)
            except WanxError as error:
                raise WanxError(f"cannot build {segment_name} of {spec.name}: {error}") from error
            file = f"{segment_name}.engine"
            shutil.move(place / file, folder / file)
            programs[segment_name] = Program(file=file, weights=segment.weights, layers=layers)
    plan = Plan(
        compiler=flavour.compiler(),
        device=flavour.device,
        types=parts.input_dtypes,
        batched=parts.batched,
        programs=programs,
        steps=parts.steps,
    )
    (folder / PLAN).write_text(plan.model_dump_json(indent=1), encoding="utf-8")
    return plan


def shapes_of(segment: Segment, ranges: Mapping[str, Range]) -> dict[str, list[list[int]]]:
    """Least, usual and largest shape of each input that has dynamic axes."""
    found = {}
    for item in segment.inputs:
        if any(isinstance(size, str) for size in item.shape):
            found[item.name] = [
                list(item.example({n: getattr(r, which) for n, r in ranges.items()}, "meta").shape)
                for which in ("least", "usual", "most")
            ]
    return found


def _work(folder: Path, request: Mapping[str, Any], tell: Callable[[float], None]) -> str:
    """Build all graphs in ``folder`` in a process that TensorRT may end; return its last words.

    Raises:
        OSError: the disk is full.
    """
    (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
    jobs = list(request["jobs"])
    log = folder / "stderr"
    with log.open("wb") as errors, subprocess.Popen(
        [sys.executable, "-m", worker.__name__, str(folder)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
    ) as child, cleanup_on_sigint(child.kill):  # fmt: skip
        try:
            assert child.stdout is not None
            for line in child.stdout:
                with suppress(ValueError):  # TensorRT itself may print
                    name, done = json.loads(line)
                    tell((jobs.index(name) + done) / len(jobs))
        except BaseException:
            child.kill()
            raise
    if child.returncode in DISK_FULL:
        raise OSError(child.returncode, os.strerror(child.returncode), str(folder))
    said = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    if child.returncode < 0:
        return f"signal {signal.Signals(-child.returncode).name}: {said:.200}"
    return f"exit code {child.returncode}: {said:.200}"


def _result(path: Path, words: str) -> list[str]:
    """What became of one graph: the lines that list the layers of its engine."""
    if not path.exists():
        raise WanxError(f"TensorRT ended its process ({words}); report this, or leave memory free")
    found = json.loads(path.read_text(encoding="utf-8"))
    if "error" in found:
        raise WanxError(found["error"])
    lines: list[str] = found["lines"]
    return lines


_LAYER = re.compile(r"Name: (\S+), LayerType: (\w+), Inputs: \[(.*?)\], Constants:")
_TYPE = re.compile(r"Datatype: (\w+)")
# What moves no data, or only waits.
_SILENT = ("signal", "wait", "shape_call", "reformat_free")


def count_layers(log: Sequence[str]) -> dict[str, int]:
    """Count the layers of an engine by kind, as a verbose build lists them.

    Products are told by the type of their first operand: ``gemm FP8``, ``attention BFloat16``;
    TensorRT calls convolutions ``correlation``.
    """
    found: Counter[str] = Counter()
    for line in log:
        for name, kind, inputs in _LAYER.findall(line):
            types = _TYPE.findall(inputs)
            if kind in _SILENT:
                continue
            if "mha" in name:
                kind = "attention"
            elif kind not in ("gemm", "conv", "correlation"):
                types = []
            found[" ".join([kind, *types[:1]])] += 1
    return dict(sorted(found.items()))


def require_layers(segment: Segment, layers: Mapping[str, int]) -> None:
    """Refuse an engine whose 8-bit layers are not 8-bit products.

    Raises:
        WanxError: says how many there are.
    """
    modules = list(segment.module.modules())
    attends = [module for module in modules if isinstance(module, QuantAttentionOp)]
    if layers.get("attention FP8", 0) < len(attends):
        raise WanxError(
            "its attention in FP8 did not become one kernel, and would hold all weights of softmax "
            "at once; export with --attention none"
        )
    layers_8bit = [module for module in modules if isinstance(module, _EIGHT_BIT)]
    for dtype, called in ((torch.float8_e4m3fn, "FP8"), (torch.int8, "Int8")):
        wanted = sum(layer.weight.dtype == dtype for layer in layers_8bit)
        built = layers.get(f"gemm {called}", 0)
        if built < wanted:
            raise WanxError(
                f"{built} of {wanted} {called} layers became {called} products "
                f"({', '.join(f'{count} {kind}' for kind, count in layers.items())})"
            )
