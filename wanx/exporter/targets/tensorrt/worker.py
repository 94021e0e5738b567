"""Builds engines from graphs in a folder, in a process of its own, which TensorRT may end.

    python -m wanx.exporter.targets.tensorrt.worker FOLDER

``request.json`` there says what to build, and stdout how far it is. Of each job ``NAME.onnx`` is
read; ``NAME.engine`` is written, and then ``NAME.json``: the layers as TensorRT lists them, or why
there is no engine.
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
from wanx.exporter.targets.tensorrt.tuning import (
    DEFAULT_OPTIONS,
    BuilderOptions,
    TimingCache,
    apply_options,
    monitor,
)
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
    newer: bool = False,
    tuning: BuilderOptions = DEFAULT_OPTIONS,
    tell: Callable[[float], None] = lambda done: None,
) -> tuple[bytes, list[str]]:
    """Build one engine.

    Args:
        trt: the module.
        graph: in ONNX.
        shapes: least, usual and largest shape of each input with dynamic axes.
        sms: GPUs to build for, where this flavour can choose.
        newer: whether for all from SM80 on, which full TensorRT can.
        tuning: options of the builder.
        tell: told how much is done, from 0 to 1, where this flavour tells.

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
    choose_gpus(trt, config, sms, newer)
    profile = builder.create_optimization_profile()
    for name, (smallest, optimal, largest) in shapes.items():
        profile.set_shape(name, tuple(smallest), tuple(optimal), tuple(largest))
    config.add_optimization_profile(profile)
    apply_options(trt, config, tuning)
    if hasattr(config, "progress_monitor"):
        watcher = monitor(trt, tell)  # the configuration keeps no reference
        config.progress_monitor = watcher
    cache = None
    if trt.__name__ == MODULES["tensorrt"]:
        kinds = "-".join(map(str, sms)) + ("+" if newer else "")
        cache = TimingCache(config, f"{trt.__version__}-{kinds}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise WanxError(f"TensorRT failed: {log.last_error()}")
    if cache is not None:
        cache.write()
    return bytes(plan), [line for text in log.lines for line in text.splitlines() if LAYER in line]


def choose_gpus(trt: Any, config: Any, sms: Sequence[int], newer: bool) -> None:
    """Tell a builder's configuration, which is for the GPU of this machine by itself.

    Args:
        trt: the module.
        config: of the builder.
        sms: GPUs to build for, where this flavour can choose.
        newer: whether for all from SM80 on, which full TensorRT can.
    """
    if newer:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif sms and hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = len(sms)
        for place, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), place)


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


def _tell(name: str, done: float) -> None:
    print(json.dumps([name, done]), flush=True)


def main() -> None:
    """Build what a folder asks for."""
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
    tuning = BuilderOptions(**request["tuning"])
    for name, shapes in request["jobs"].items():
        found: dict[str, Any]
        try:
            graph = (folder / f"{name}.onnx").read_bytes()
            tell = partial(_tell, name)
            engine, lines = build_engine(
                trt, graph, shapes, request["sms"], request["newer"], tuning, tell
            )
            (folder / f"{name}.engine").write_bytes(engine)
            found = {"lines": lines}
        except WanxError as error:
            found = {"error": str(error)}
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
