"""Registry of backends: one row for each target that a bundle can have.

A row's ``load`` imports its backend when it is called. Engines of a target are built by the row of
the same name in :mod:`wanx.exporter.targets.registry`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from wanx.bundle.reader import Bundle
from wanx.config.bounds import MAX_THREADS, require_between
from wanx.errors import EnvironmentMismatchError, UsageError
from wanx.runtime.sessions.base import Session
from wanx.runtime.sessions.engine_session import RUNS_BEFORE_CAPTURE
from wanx.runtime.sessions.onnxruntime.providers import (
    AUTO,
    CPU,
    PROVIDERS,
    ProviderOptions,
    check_provider,
    resolve_provider,
)
from wanx.runtime.sessions.tensorrt.library import MODULES

_log = logging.getLogger("wanx.runtime")


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Options of a session; see :func:`wanx.runtime.sessions.open_session`.

    Raises:
        UsageError: there are more threads than any machine needs, or there is no such provider.
    """

    threads: int | None = None
    vram_budget: int | None = None
    provider: str | None = None
    fallback: bool = False

    def __post_init__(self) -> None:
        require_between("threads", self.threads, 1, MAX_THREADS)
        if self.provider is not None:
            check_provider(self.provider)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Backend that runs the bundles of one target.

    Attributes:
        load: loads a component of a bundle.
        warm_up_runs: first runs of a shape that are slower than the following ones.
        uses_gpu: the backend computes on a GPU, unless its engines say otherwise.
        no_vram_budget: reason why ``--vram-budget`` is refused; None where weights are streamed.
        module: Python module that it needs beyond those of every installation, if any.
        product: name of that module for people; None is the module's own.
        extra: of wanx, which installs the module.
    """

    load: Callable[[Bundle, str, SessionOptions], Session]
    warm_up_runs: int
    uses_gpu: bool
    no_vram_budget: str | None
    module: str | None = None
    product: str | None = None
    extra: str | None = None


def _load_onnxruntime(bundle: Bundle, component: str, options: SessionOptions) -> Session:
    from wanx.runtime.sessions.onnxruntime.session import OnnxRuntimeSession

    target = bundle.manifest.target
    default = target if target in PROVIDERS and target != CPU else AUTO
    asked = options.provider or default
    try:
        provider = resolve_provider(asked, component)
    except EnvironmentMismatchError as error:
        if options.provider is not None:
            raise
        raise EnvironmentMismatchError(
            f"{bundle.root} was built for {target}: {error}; or run it on the processor: "
            f"{bundle.build_command(CPU)}"
        ) from None
    if asked == AUTO and provider != CPU:
        _log.info("%s runs on %s, where it was measured to be faster", component, provider)
    return OnnxRuntimeSession(
        bundle,
        component,
        provider=provider,
        fallback=options.fallback,
        options=ProviderOptions(threads=options.threads, vram_budget=options.vram_budget),
    )


def _load_aoti(bundle: Bundle, component: str, options: SessionOptions) -> Session:
    from wanx.runtime.sessions.aoti.session import AotiSession

    return AotiSession(bundle, component, threads=options.threads)


def _load_tensorrt(bundle: Bundle, component: str, options: SessionOptions) -> Session:
    from wanx.runtime.sessions.tensorrt.session import TensorRTSession

    return TensorRTSession(
        bundle, component, threads=options.threads, vram_budget=options.vram_budget
    )


BACKENDS: Mapping[str, Backend] = {
    CPU: Backend(
        load=_load_onnxruntime,
        warm_up_runs=1,
        uses_gpu=False,
        no_vram_budget="GPUs, and this bundle runs on the processor",
    ),
    "cuda": Backend(
        load=_load_onnxruntime,
        warm_up_runs=1,
        uses_gpu=True,
        no_vram_budget=None,
    ),
    "openvino": Backend(
        load=_load_onnxruntime,
        warm_up_runs=1,
        uses_gpu=False,
        no_vram_budget="GPUs, and OpenVINO runs on the processor",
    ),
    "aoti": Backend(
        load=_load_aoti,
        warm_up_runs=RUNS_BEFORE_CAPTURE + 1,
        uses_gpu=True,
        no_vram_budget="engines of TensorRT; PyTorch manages the memory of this bundle, whose "
        "target is aoti",
        module="torch",
        product="PyTorch",
        extra="export",
    ),
    "rtx": Backend(
        load=_load_tensorrt,
        warm_up_runs=RUNS_BEFORE_CAPTURE + 1,
        uses_gpu=True,
        no_vram_budget=None,
        module=MODULES["rtx"],
        extra="rtx",
    ),
    "tensorrt": Backend(
        load=_load_tensorrt,
        warm_up_runs=RUNS_BEFORE_CAPTURE + 1,
        uses_gpu=True,
        no_vram_budget=None,
        module=MODULES["tensorrt"],
        extra="tensorrt",
    ),
}


def load_component(bundle: Bundle, component: str, options: SessionOptions) -> Session:
    """Load a component on the backend of the bundle's target, or on a provider of ONNX Runtime.

    A component without engines of that target runs as its portable graph.

    Raises:
        EnvironmentMismatchError: the backend's module is not installed.
        WanxError: the backend cannot load the component.
    """
    target = bundle.manifest.target
    has_engine = target in bundle.manifest.components[component].engines
    backend = BACKENDS[CPU]
    if options.provider is None and has_engine and target in BACKENDS:
        backend = BACKENDS[target]
    if backend.module is not None and find_spec(backend.module) is None:
        raise EnvironmentMismatchError(
            f"the engines of {bundle.root} need {backend.product or backend.module}, which is not "
            f"installed; pip install 'wanx[{backend.extra}]'"
        )
    with bundle.names_in_errors():
        return backend.load(bundle, component, options)


def require_budget(target: str, provider: str | None = None) -> None:
    """Refuse a budget of GPU memory for a bundle that cannot keep to one.

    Args:
        target: of the bundle.
        provider: of ONNX Runtime that was asked for, if any.

    Raises:
        UsageError: says why.
    """
    reason = BACKENDS.get(provider or target, BACKENDS[CPU]).no_vram_budget
    if reason is not None:
        raise UsageError(f"--vram-budget is for {reason}: leave it out")
