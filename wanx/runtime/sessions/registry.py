"""Registry of backends: one row for each target that a bundle can have.

A row's ``load`` imports its backend when it is called. Engines of a target are built by the row of
the same name in :mod:`wanx.exporter.targets.registry`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

from wanx.bundle.manifest import Manifest
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
    fastest_provider,
    require_installed,
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
    provider: str = AUTO
    fallback: bool = False
    arena: bool = True

    def __post_init__(self) -> None:
        require_between("threads", self.threads, 1, MAX_THREADS)
        check_provider(self.provider)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Backend that runs the bundles of one target.

    Attributes:
        load: loads a component of a bundle.
        warm_up_runs: first runs of a shape that are slower than the following ones.
        uses_gpu: the backend computes on a GPU, unless its engines say otherwise.
        no_vram_budget: reason why ``--vram-budget`` is refused; None where weights are streamed.
        device_memory: bytes of the GPU's memory that a session may take, of a budget or None;
            None where there is no GPU. Left out where the memory is the host's, or unknown.
        module: Python module that it needs beyond those of every installation, if any.
        product: name of that module for people; None is the module's own.
        extra: of wanx, which installs the module.
    """

    load: Callable[[Bundle, str, SessionOptions], Session]
    warm_up_runs: int
    uses_gpu: bool
    no_vram_budget: str | None
    device_memory: Callable[[int | None], int | None] | None = None
    module: str | None = None
    product: str | None = None
    extra: str | None = None


def _load_onnxruntime(bundle: Bundle, component: str, options: SessionOptions) -> Session:
    from wanx.runtime.sessions.onnxruntime.session import OnnxRuntimeSession

    manifest = bundle.manifest
    target = manifest.target
    provider = provider_of(manifest, component, options.provider)
    assert provider is not None, "another runtime has engines of it"
    chosen = options.provider == AUTO and provider not in (CPU, target)
    try:
        require_installed(provider)
    except EnvironmentMismatchError as error:
        if options.fallback:
            _log.warning("%s goes on on the processor: %s", component, error)
            provider = CPU
        elif options.provider == AUTO:
            raise EnvironmentMismatchError(
                f"{bundle.root} was built for {target}: {error}; or run it on the processor: "
                "--provider cpu"
            ) from None
        else:
            raise
    if chosen:
        _log.info("%s runs on %s, where it was measured to be faster", component, provider)
    return OnnxRuntimeSession(
        bundle,
        component,
        provider=provider,
        fallback=options.fallback or chosen,  # nobody asked for one that fails
        options=ProviderOptions(
            threads=options.threads, vram_budget=options.vram_budget, arena=options.arena
        ),
    )


def _load_aoti(bundle: Bundle, component: str, options: SessionOptions) -> Session:
    from wanx.runtime.sessions.aoti.session import AotiSession

    return AotiSession(bundle, component, threads=options.threads)


def _load_tensorrt(bundle: Bundle, component: str, options: SessionOptions) -> Session:
    from wanx.runtime.sessions.tensorrt.session import TensorRTSession

    return TensorRTSession(
        bundle, component, threads=options.threads, vram_budget=options.vram_budget
    )


def _aoti_memory(budget: int | None) -> int | None:
    if find_spec("torch") is None:  # which loading will say
        return None
    from wanx.runtime.sessions.aoti.free_memory import free_memory

    free = free_memory()
    return free if free is None or budget is None else min(free, budget)


def _tensorrt_memory(budget: int | None) -> int | None:
    from wanx.runtime.sessions.device.cuda import CudaError, open_cuda

    with suppress(EnvironmentMismatchError, CudaError):  # which loading will say
        cuda = open_cuda("tensorrt", budget)
        try:
            return cuda.available_memory()
        finally:
            cuda.close()
    return None


def _onnxruntime(name: str) -> Backend:
    """Backend of a provider of ONNX Runtime."""
    provider = PROVIDERS[name]
    reason = None
    if not provider.uses_gpu:
        reason = f"GPUs, and the provider {name} runs on the processor"
    elif not provider.limits_memory:
        limiting = ", ".join(name for name, row in PROVIDERS.items() if row.limits_memory)
        reason = f"engines of TensorRT and the provider {limiting}, and not for {name}"
    return Backend(
        load=_load_onnxruntime,
        warm_up_runs=RUNS_BEFORE_CAPTURE + 1 if provider.captures else 1,
        uses_gpu=provider.uses_gpu,
        no_vram_budget=reason,
    )


BACKENDS: Mapping[str, Backend] = {
    CPU: _onnxruntime(CPU),
    "cuda": _onnxruntime("cuda"),
    "openvino": _onnxruntime("openvino"),
    "aoti": Backend(
        load=_load_aoti,
        warm_up_runs=RUNS_BEFORE_CAPTURE + 1,
        uses_gpu=True,
        no_vram_budget="engines of TensorRT; PyTorch manages the memory of this bundle, whose "
        "target is aoti",
        device_memory=_aoti_memory,
        module="torch",
        product="PyTorch",
        extra="export",
    ),
    "rtx": Backend(
        load=_load_tensorrt,
        warm_up_runs=RUNS_BEFORE_CAPTURE + 1,
        uses_gpu=True,
        no_vram_budget=None,
        device_memory=_tensorrt_memory,
        module=MODULES["rtx"],
        extra="rtx",
    ),
    "tensorrt": Backend(
        load=_load_tensorrt,
        warm_up_runs=RUNS_BEFORE_CAPTURE + 1,
        uses_gpu=True,
        no_vram_budget=None,
        device_memory=_tensorrt_memory,
        module=MODULES["tensorrt"],
        extra="tensorrt",
    ),
}


def backend_of(target: str, provider: str = AUTO) -> Backend:
    """Backend that runs a bundle.

    Args:
        target: of the bundle.
        provider: that was asked for.
    """
    if provider != AUTO:
        return _onnxruntime(provider)
    return BACKENDS.get(target, BACKENDS[CPU])


def effective_provider(provider: str, *, fallback: bool) -> str:
    """Provider that will run: the processor's where one that is missing may be done without."""
    missing = provider != AUTO and not PROVIDERS[provider].is_installed
    return CPU if missing and fallback else provider


def provider_of(manifest: Manifest, component: str, provider: str = AUTO) -> str | None:
    """Provider of ONNX Runtime that runs a component; None where engines of another runtime do.

    Args:
        manifest: of the bundle.
        component: such as ``dit``.
        provider: that was asked for; ``auto`` is the target's own, and where the target is ``cpu``,
            or has no engine of the component, what was measured to be faster.
    """
    if provider != AUTO:
        return provider
    target = manifest.target
    if target in manifest.components[component].engines and target not in PROVIDERS:
        return None
    own = target in PROVIDERS and target != CPU
    return target if own else fastest_provider(component, manifest.config)


def device_memory(manifest: Manifest, budget: int | None) -> int | None:
    """Bytes of the GPU's memory that engines of a bundle may take; None where that is unknown.

    Args:
        manifest: of the bundle.
        budget: most bytes to take; None takes what is free.
    """
    backend = BACKENDS.get(manifest.target)
    if backend is None or backend.device_memory is None:
        return None
    return backend.device_memory(budget)


def load_component(bundle: Bundle, component: str, options: SessionOptions) -> Session:
    """Load a component on the backend of the bundle's target, or on a provider of ONNX Runtime.

    A component without engines of that target runs as its portable graph.

    Raises:
        EnvironmentMismatchError: the backend's module is not installed.
        WanxError: the backend cannot load the component.
    """
    target = bundle.manifest.target
    has_engine = target in bundle.manifest.components[component].engines
    backend = backend_of(target if has_engine else CPU, options.provider)
    if backend.module is not None and find_spec(backend.module) is None:
        raise EnvironmentMismatchError(
            f"the engines of {bundle.root} need {backend.product or backend.module}, which is not "
            f"installed; pip install 'wanx[{backend.extra}]'"
        )
    with bundle.names_in_errors():
        return backend.load(bundle, component, options)


def require_budget(target: str, provider: str = AUTO) -> None:
    """Refuse a budget of GPU memory for a bundle that cannot keep to one.

    Args:
        target: of the bundle.
        provider: of ONNX Runtime that was asked for.

    Raises:
        UsageError: says why.
    """
    reason = backend_of(target, provider).no_vram_budget
    if reason is not None:
        raise UsageError(f"--vram-budget is for {reason}: leave it out")


def require_provider(provider: str, *, fallback: bool = False) -> None:
    """Refuse a provider of ONNX Runtime that there is not.

    Args:
        provider: that was asked for.
        fallback: one that is not installed is none to refuse.

    Raises:
        UsageError: names the nearest one.
        EnvironmentMismatchError: it is not installed.
    """
    check_provider(provider)
    if not fallback:
        require_installed(provider)
