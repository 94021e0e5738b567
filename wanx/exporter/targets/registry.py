"""Registry of targets: one row for each; its factory imports the builder late.

Engines are run by the row of the same name in :mod:`wanx.runtime.sessions.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanx.errors import UsageError
from wanx.exporter.packages import require_packages
from wanx.exporter.targets.base import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from wanx.bundle.manifest import Manifest
    from wanx.exporter.graph.cache import GraphCache
    from wanx.exporter.targets.onnxruntime.cuda.kernel_table import MissingKernel


def _cpu(text: str) -> Target | None:
    if text != "cpu":
        return None
    return Target(name=text, prepare=lambda manifest, options: None)


def _openvino(text: str) -> Target | None:
    if text != "openvino":
        return None

    require_packages("write graphs for OpenVINO")

    def graph(root: Path, manifest: Manifest, component: str, cache: GraphCache) -> ir.Model:
        from wanx.exporter.targets.onnxruntime.openvino.graph import openvino_graph

        return openvino_graph(root, manifest, component)

    return Target(name=text, prepare=lambda manifest, options: None, graph=graph)


def _cuda(text: str) -> Target | None:
    if text != "cuda":
        return None

    require_packages("write graphs for CUDA")

    def graph(root: Path, manifest: Manifest, component: str, cache: GraphCache) -> ir.Model:
        from wanx.exporter.targets.onnxruntime.cuda.graph import cuda_graph

        return cuda_graph(root, manifest, component, cache=cache)

    def missing_kernels(path: Path) -> list[MissingKernel]:
        from wanx.exporter.targets.onnxruntime.cuda.missing_kernels import unsupported_nodes

        return unsupported_nodes(path)

    return Target(
        name=text,
        prepare=lambda manifest, options: None,
        may_be_elsewhere=True,
        graph=graph,
        missing_kernels=missing_kernels,
    )


def _aoti(text: str) -> Target | None:
    if text != "aoti":
        return None
    require_packages("build engines")
    from wanx.exporter.targets.aoti import AotiBuilder

    return Target(name=text, prepare=lambda manifest, options: AotiBuilder())


def _tensorrt(text: str) -> Target | None:
    require_packages("build engines")
    from wanx.exporter.targets.tensorrt.gpus import parse_target
    from wanx.exporter.targets.tensorrt.target import prepare

    target = parse_target(text)
    if target is None:
        return None
    return Target(name=target.name, prepare=partial(prepare, target), may_be_elsewhere=True)


TARGETS: Mapping[str, Callable[[str], Target | None]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "openvino": _openvino,
    "aoti": _aoti,
    "rtx": _tensorrt,
    "tensorrt": _tensorrt,
}


def parse_target(text: str) -> Target:
    """Parse a target such as ``cpu``, ``aoti``, ``rtx:sm89,sm120`` or ``tensorrt:sm80+``.

    Raises:
        UsageError: there is no such target, or it does not build for such a GPU.
    """
    factory = TARGETS.get(text.partition(":")[0])
    target = None if factory is None else factory(text)
    if target is None:
        raise UsageError(f"--target {text} is not available; choose {', '.join(TARGETS)}")
    return target
