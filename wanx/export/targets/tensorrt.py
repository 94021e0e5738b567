"""The targets ``rtx`` and ``tensorrt``: engines of the segments of each component.

Both flavours of TensorRT share this code; what one of them lacks is found by looking. TensorRT-RTX
builds for GPUs that this machine need not have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wanx.engine_plan import PLAN, Plan, Program
from wanx.errors import WanxError
from wanx.export.components import ComponentSpec
from wanx.export.cut import cut
from wanx.export.segments import Segment
from wanx.export.targets.tensorrt_flavour import Flavour
from wanx.export.targets.tensorrt_graph import segment_graph
from wanx.export.targets.tensorrt_ranges import Range
from wanx.models.quantized import DynamicQuantLinear, QuantAttend, QuantLinear
from wanx.runtime.sessions.tensorrt_plugin import register

_EIGHT_BIT = (QuantLinear, DynamicQuantLinear)  # weight and input
Sizes = Mapping[str, int]


def build(
    spec: ComponentSpec,
    dtype: torch.dtype,
    flavour: Flavour,
    ranges: Mapping[str, Range],
    folder: Path,
    plugins: Collection[str] = (),
    on_program: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Build the engines of a component.

    Args:
        spec: as it is, or with 8-bit layers.
        dtype: that it computes in.
        flavour: which TensorRT, and for which GPUs.
        ranges: of each dynamic axis.
        folder: a new one for the engines and the plan.
        plugins: functions that our kernels run, as :func:`parse_plugins` reads them.
        on_program: told how many engines are done, of how many.

    Raises:
        EnvironmentMismatchError: this TensorRT is not installed.
        WanxError: an engine does not build, or is not what was asked for.
    """
    trt = flavour.module()
    parts = cut(spec, dtype)
    folder.mkdir(parents=True)
    programs = {}
    on_program(0, len(parts.segments))
    for done, (name, segment) in enumerate(parts.segments.items(), 1):
        try:
            engine, layers = build_segment(trt, segment, parts.axes, flavour.sms, ranges, plugins)
        except WanxError as error:
            raise WanxError(f"cannot build {name} of {spec.name}: {error}") from error
        (folder / f"{name}.engine").write_bytes(engine)
        programs[name] = Program(file=f"{name}.engine", weights=segment.weights, layers=layers)
        on_program(done, len(parts.segments))
    plan = Plan(
        compiler=flavour.compiler(),
        device=flavour.device,
        types=parts.types,
        batched=parts.batched,
        programs=programs,
        steps=parts.steps,
    )
    (folder / PLAN).write_text(plan.model_dump_json(indent=1), encoding="utf-8")
    return plan


def build_segment(
    trt: Any,
    segment: Segment,
    axes: Sizes,
    sms: Sequence[int],
    ranges: Mapping[str, Range],
    plugins: Collection[str] = (),
) -> tuple[bytes, dict[str, int]]:
    """Build one engine; it holds no weights.

    Returns:
        The plan of TensorRT, and its layers by kind.

    Raises:
        WanxError: it does not build, or an 8-bit product or an attention is not one kernel.
    """
    if plugins:
        register(trt)
    graph = segment_graph(segment, axes, plugins=plugins, sms=sms)
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.SerializeToString()):
        raise WanxError(f"TensorRT does not read its graph: {log.last_error()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Sessions give the memory, as much as a shape needs, and record what runs.
    _set(trt, "BuilderFlag", "REQUIRE_USER_ALLOCATION", config.set_flag)
    resize = partial(_enable, config)
    _set(trt, "PreviewFeature", "RUNTIME_ACTIVATION_RESIZE_10_10", resize)
    if sms and hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = len(sms)
        for place, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), place)
    profile = builder.create_optimization_profile()
    for item in segment.inputs:
        if any(isinstance(size, str) for size in item.shape):
            shapes = [
                tuple(item.example({n: getattr(r, which) for n, r in ranges.items()}, "meta").shape)
                for which in ("least", "usual", "most")
            ]
            profile.set_shape(item.name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise WanxError(f"TensorRT failed: {log.last_error()}")
    layers = count_layers(log.lines)
    require_layers(segment, layers)
    return bytes(plan), layers


def _set(trt: Any, kind: str, name: str, call: Callable[[Any], object]) -> None:
    """Turn on what this flavour has of that name."""
    if hasattr(getattr(trt, kind, None), name):
        call(getattr(getattr(trt, kind), name))


def _enable(config: Any, feature: Any) -> None:
    config.set_preview_feature(feature, True)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT says."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))

        def last_error(self) -> str:
            return f"{self.errors[-1]:.300}" if self.errors else "it gave no reason"

    return Log()


_LAYER = re.compile(r"Name: (\S+), LayerType: (\w+), Inputs: \[(.*?)\], Constants:")
_TYPE = re.compile(r"Datatype: (\w+)")
# What moves no data, or only waits.
_SILENT = ("signal", "wait", "shape_call", "reformat_free")


def count_layers(log: Sequence[str]) -> dict[str, int]:
    """Count the layers of an engine by kind, as a verbose build lists them.

    Products are told by the type of their first operand: ``gemm FP8``, ``attention BFloat16``.
    """
    found: Counter[str] = Counter()
    for line in log:
        for name, kind, inputs in _LAYER.findall(line):
            types = _TYPE.findall(inputs)
            if kind in _SILENT:
                continue
            if "mha" in name:
                kind = "attention"
            elif kind not in ("gemm", "conv"):
                types = []
            found[" ".join([kind, *types[:1]])] += 1
    return dict(sorted(found.items()))


def require_layers(segment: Segment, layers: Mapping[str, int]) -> None:
    """Refuse an engine whose 8-bit layers are not 8-bit products.

    Raises:
        WanxError: says how many there are.
    """
    modules = list(segment.module.modules())
    attends = [module for module in modules if isinstance(module, QuantAttend)]
    if layers.get("attention FP8", 0) < len(attends):
        raise WanxError(
            "its attention in FP8 did not become one kernel, and would hold all weights of softmax "
            "at once; export with --attention high"
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
