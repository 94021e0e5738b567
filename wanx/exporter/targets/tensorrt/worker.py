"""Worker process, which TensorRT may end, that builds engines from graphs in a folder.

    python -m wanx.exporter.targets.tensorrt.worker FOLDER

``request.json`` there lists the jobs, and stdout reports progress. Of each job ``NAME.onnx`` is
read; ``NAME.engine`` is written, and then ``NAME.json``: the layers as TensorRT lists them, or the
error.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wanx.errors import WanxError
from wanx.exporter.targets.base import OnFraction, no_fraction
from wanx.exporter.targets.options import DEFAULT_OPTIONS, BuilderOptions
from wanx.exporter.targets.tensorrt.progress import progress_monitor
from wanx.exporter.targets.tensorrt.timing_cache import TimingCache
from wanx.runtime.sessions.tensorrt.library import MODULES, import_tensorrt
from wanx.runtime.sessions.tensorrt.plugin import register

REQUEST = "request.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # exit codes then, too
LAYER = "LayerType: "
Shapes = Mapping[str, Sequence[Sequence[int]]]


def build_engine(
    trt: Any,
    graph: bytes,
    shapes: Shapes,
    sms: Sequence[int],
    ampere_plus: bool = False,
    options: BuilderOptions = DEFAULT_OPTIONS,
    on_fraction: OnFraction = no_fraction,
) -> tuple[bytes, list[str]]:
    """Build one engine.

    Args:
        trt: the module.
        graph: in ONNX.
        shapes: min, opt and max shape of each input with dynamic axes.
        sms: GPUs to build for, where this TensorRT can choose.
        ampere_plus: one engine for all GPUs from SM80 on, which full TensorRT can build.
        options: of the builder.
        on_fraction: told how much is done, where this TensorRT reports it.

    Returns:
        The plan, and the lines of TensorRT's log that list layers.

    Raises:
        WanxError: TensorRT does not read or build it.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        raise WanxError(f"TensorRT does not read its graph: {log.last_error()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Sessions give the memory, as much as a shape needs, and record what runs.
    _set(trt, "BuilderFlag", "REQUIRE_USER_ALLOCATION", config.set_flag)
    resize = partial(_enable, config)
    _set(trt, "PreviewFeature", "RUNTIME_ACTIVATION_RESIZE_10_10", resize)
    choose_gpus(trt, config, sms, ampere_plus)
    profile = builder.create_optimization_profile()
    for name, (smallest, optimal, largest) in shapes.items():
        profile.set_shape(name, tuple(smallest), tuple(optimal), tuple(largest))
    config.add_optimization_profile(profile)
    apply_options(trt, config, options)
    if hasattr(config, "progress_monitor"):
        watcher = progress_monitor(trt, on_fraction)  # the configuration keeps no reference
        config.progress_monitor = watcher
    cache = None
    if trt.__name__ == MODULES["tensorrt"]:
        kinds = "-".join(map(str, sms)) + ("+" if ampere_plus else "")
        cache = TimingCache(config, f"{trt.__version__}-{kinds}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise WanxError(f"TensorRT failed: {log.last_error()}")
    if cache is not None:
        cache.write()
    return bytes(plan), [line for text in log.lines for line in text.splitlines() if LAYER in line]


def apply_options(trt: Any, config: Any, options: BuilderOptions) -> None:
    """Set a builder's configuration.

    Raises:
        WanxError: this TensorRT has no levels, and one was asked for.
    """
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.opt_level is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise WanxError("this TensorRT has no levels of optimisation; leave --opt-level out")
        config.builder_optimization_level = options.opt_level


def choose_gpus(trt: Any, config: Any, sms: Sequence[int], ampere_plus: bool) -> None:
    """Set the compute capabilities; by default, those of this machine's GPU.

    Args:
        trt: the module.
        config: of the builder.
        sms: GPUs to build for, where this TensorRT can choose.
        ampere_plus: one engine for all GPUs from SM80 on, which full TensorRT can build.
    """
    if ampere_plus:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif sms and hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)


def _set(trt: Any, kind: str, name: str, call: Callable[[Any], object]) -> None:
    """Enable a feature where this TensorRT has it."""
    if hasattr(getattr(trt, kind, None), name):
        call(getattr(getattr(trt, kind), name))


def _enable(config: Any, feature: Any) -> None:
    config.set_preview_feature(feature, True)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Messages of TensorRT."""

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


def _print_fraction(name: str, done: float) -> None:
    print(json.dumps([name, done]), flush=True)


def main() -> None:
    """Build the jobs of a folder."""
    try:
        _build_all(Path(sys.argv[1]))
    except OSError as error:
        if error.errno in DISK_FULL:
            sys.exit(error.errno)
        raise


def _build_all(folder: Path) -> None:
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    trt = import_tensorrt(request["module"])
    if request["plugins"]:
        register(trt)
    options = BuilderOptions(**request["options"])
    for name, shapes in request["jobs"].items():
        result: dict[str, Any]
        try:
            graph = (folder / f"{name}.onnx").read_bytes()
            on_fraction = partial(_print_fraction, name)
            engine, lines = build_engine(
                trt, graph, shapes, request["sms"], request["ampere_plus"], options, on_fraction
            )
            (folder / f"{name}.engine").write_bytes(engine)
            result = {"lines": lines}
        except WanxError as error:
            result = {"error": str(error)}
        (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
