"""The targets ``rtx`` and ``tensorrt``: engines of the segments of each component.

Both TensorRTs share this code; what one of them lacks is found by looking. TensorRT-RTX
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from wanx.bundle.engine_schedule import SCHEDULE, EngineSchedule, Program, Weight
from wanx.bundle.manifest import Component, Manifest
from wanx.config.number_formats import INT8, QUANTIZED, UINT8
from wanx.errors import WanxError
from wanx.exporter.partition.segments import Partition, Segment
from wanx.exporter.targets.base import Builder, OnFraction, no_fraction
from wanx.exporter.targets.options import DEFAULT_OPTIONS, BuilderOptions
from wanx.exporter.targets.tensorrt import worker
from wanx.exporter.targets.tensorrt.gpus import (
    TensorRTTarget,
    for_this_machine,
    parse_plugins,
    require_plugins,
    require_precision,
)
from wanx.exporter.targets.tensorrt.graph import graph_with_plugins
from wanx.exporter.targets.tensorrt.nodes import Replaced, plugin_notes
from wanx.exporter.targets.tensorrt.ranges import Range, ranges
from wanx.exporter.targets.tensorrt.worker import DISK_FULL, REQUEST
from wanx.interruption import cleanup_on_sigint
from wanx.kernels.number_formats import FORMATS
from wanx.models.quantized import DynamicQuantLinear, QuantAttentionOp, QuantLinear
from wanx.runtime.sessions.tensorrt.library import MODULES

_EIGHT_BIT = (QuantLinear, DynamicQuantLinear)  # weight and input


def prepare(target: TensorRTTarget, manifest: Manifest, options: BuilderOptions) -> TensorRTBuilder:
    """Make the builder for a bundle.

    Raises:
        EnvironmentMismatchError: this TensorRT is not installed.
        UsageError: an option is out of range, or the GPU lacks the bundle's precision.
    """
    require_precision(target, manifest.precision)
    target = for_this_machine(target)
    recipe = manifest.components["dit"].quantization
    covered = ranges(
        manifest.config,
        fp8_attention=recipe is not None and recipe.attention == "fp8",
        sizes=options.sizes,
        frames=options.frames,
    )
    plugins = parse_plugins(options.plugins)
    require_plugins(target, plugins)
    return TensorRTBuilder(target=target, ranges=covered, plugins=plugins, options=options)


@dataclass(kw_only=True)
class TensorRTBuilder(Builder):
    """Builder of engines with one of the two TensorRTs.

    Attributes:
        target: it, and the GPUs.
        ranges: of each dynamic axis.
        plugins: functions that our kernels run.
        options: of the builder.
    """

    target: TensorRTTarget
    ranges: Mapping[str, Range]
    plugins: tuple[str, ...] = ()
    options: BuilderOptions = DEFAULT_OPTIONS
    _replaced: list[Replaced] = field(default_factory=list)

    @property
    def device(self) -> str:
        """The GPUs, such as ``sm89+sm120``."""
        return self.target.device

    @property
    def fingerprint(self) -> str:
        """TensorRT, its version, and the options that make other engines."""
        sizes = repr(sorted(self.ranges.items()))
        words = [self.target.compiler(), *self.plugins, sizes, self.options.builder_key]
        return " ".join(filter(None, words))

    def compute_dtype(self, group: str, component: Component) -> torch.dtype:
        """Return bf16, which every component computes in around its 8-bit layers."""
        return torch.bfloat16

    def build(
        self, component: str, parts: Partition, folder: Path, on_fraction: OnFraction = no_fraction
    ) -> EngineSchedule:
        """Build the engines of a component; see :meth:`Builder.build`.

        Raises:
            EnvironmentMismatchError: this TensorRT is not installed.
            OSError: the disk is full.
            WanxError: an engine does not build, or is not what was asked for.
        """
        self.target.module()
        folder.mkdir(parents=True)
        programs = {}
        with tempfile.TemporaryDirectory(dir=folder) as name:
            temporary = Path(name)
            for segment_name, segment in parts.segments.items():
                graph, replaced = graph_with_plugins(
                    segment, parts.axes, self.plugins, self.target.sms
                )
                self._replaced.append(replaced)
                (temporary / f"{segment_name}.onnx").write_bytes(graph.SerializeToString())
            jobs = {n: shapes_of(segment, self.ranges) for n, segment in parts.segments.items()}
            request = {
                "module": MODULES[self.target.name], "sms": self.target.sms,
                "ampere_plus": self.target.ampere_plus, "plugins": bool(self.plugins),
                "options": asdict(self.options), "jobs": jobs,
            }  # fmt: skip
            last_words = _work(temporary, request, on_fraction)
            for segment_name, segment in parts.segments.items():
                try:
                    lines = _result(temporary / f"{segment_name}.json", last_words)
                    layers = count_layers(lines)
                    require_layers(segment, layers)
                except WanxError as error:
                    raise WanxError(
                        f"cannot build {segment_name} of {component}: {error}"
                    ) from error
                file = f"{segment_name}.engine"
                shutil.move(temporary / file, folder / file)
                programs[segment_name] = Program(
                    file=file, weights=signed_weights(segment), layers=layers
                )
        schedule = EngineSchedule(
            compiler=self.target.compiler(),
            device=self.target.device,
            input_dtypes=parts.input_dtypes,
            batched=parts.batched,
            programs=programs,
            steps=parts.steps,
        )
        (folder / SCHEDULE).write_text(schedule.to_json(), encoding="utf-8")
        return schedule

    def notes(self) -> list[str]:
        """Return a line for each plug-in: how many nodes it took, and why others were left."""
        return plugin_notes(self.plugins, self._replaced)


def signed_weights(segment: Segment) -> tuple[Weight, ...]:
    """Weights of a segment as its engine takes them: around zero where they are stored above it.

    TensorRT looks up no rows of uint8.
    """
    return tuple(
        weight.model_copy(update={"dtype": INT8.safetensors})
        if weight.dtype == UINT8.safetensors
        else weight
        for weight in segment.weights
    )


def shapes_of(segment: Segment, ranges: Mapping[str, Range]) -> dict[str, list[list[int]]]:
    """Compute the min, opt and max shape of each input that has dynamic axes."""
    return {
        item.name: [
            list(item.example({n: getattr(r, bound) for n, r in ranges.items()}, "meta").shape)
            for bound in ("min", "opt", "max")
        ]
        for item in segment.inputs
        if any(isinstance(size, str) for size in item.shape)
    }


def _work(folder: Path, request: Mapping[str, Any], on_fraction: OnFraction) -> str:
    """Build all graphs in ``folder`` in a process that TensorRT may end; return its last line.

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
                    on_fraction((jobs.index(name) + done) / len(jobs))
        except BaseException:
            child.kill()
            raise
    if child.returncode in DISK_FULL:
        raise OSError(child.returncode, os.strerror(child.returncode), str(folder))
    last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    if child.returncode < 0:
        return f"signal {signal.Signals(-child.returncode).name}: {last:.200}"
    return f"exit code {child.returncode}: {last:.200}"


def _result(path: Path, last_words: str) -> list[str]:
    """Read the result of one graph: the log lines that list the layers of its engine."""
    if not path.exists():
        raise WanxError(
            f"TensorRT ended its process ({last_words}); report this, or leave memory free"
        )
    result = json.loads(path.read_text(encoding="utf-8"))
    if "error" in result:
        raise WanxError(result["error"])
    lines: list[str] = result["lines"]
    return lines


_LAYER = re.compile(r"Name: (\S+), LayerType: (\w+), Inputs: \[(.*?)\], Constants:")
_TYPE = re.compile(r"Datatype: (\w+)")
# Layers that move no data, or only wait.
_SILENT = ("signal", "wait", "shape_call", "reformat_free")


def count_layers(log: Sequence[str]) -> dict[str, int]:
    """Count the layers of an engine by kind, as a verbose build lists them.

    Products are told by the type of their first operand: ``gemm FP8``, ``attention BFloat16``;
    TensorRT calls convolutions ``correlation``.
    """
    layers: Counter[str] = Counter()
    for line in log:
        for name, kind, inputs in _LAYER.findall(line):
            types = _TYPE.findall(inputs)
            if kind in _SILENT:
                continue
            if "mha" in name:
                kind = "attention"
            elif kind not in ("gemm", "conv", "correlation"):
                types = []
            layers[" ".join([kind, *types[:1]])] += 1
    return dict(sorted(layers.items()))


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
    for row in QUANTIZED:
        called = row.tensorrt_layer
        expected = sum(FORMATS[layer.weight.dtype] == row for layer in layers_8bit)
        built = layers.get(f"gemm {called}", 0)
        if built < expected:
            raise WanxError(
                f"{built} of {expected} {called} layers became {called} products "
                f"({', '.join(f'{count} {kind}' for kind, count in layers.items())})"
            )
