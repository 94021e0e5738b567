"""Registry of ONNX Runtime's execution providers: one row for each that ``--provider`` takes.

Some are part of the package ``onnxruntime`` or ``onnxruntime-gpu``. Others are plug-in packages,
whose library is registered with ONNX Runtime, which then lists the devices that it can use.
"""

from __future__ import annotations

import difflib
import functools
import json
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanx.config.models import ModelConfig
from wanx.errors import EnvironmentMismatchError, UsageError

if TYPE_CHECKING:
    import onnxruntime

AUTO = "auto"
CPU = "cpu"
_CPU_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True, kw_only=True)
class ProviderOptions:
    """Options that a provider may have a setting for.

    Attributes:
        threads: of the processor; None takes all cores.
        vram_budget: most bytes of the GPU's memory; None takes what is needed.
        captures: runs of a repeated shape shall become CUDA graphs.
        arena: the memory of values is kept for the next run.
    """

    threads: int | None = None
    vram_budget: int | None = None
    captures: bool = False
    arena: bool = True


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Execution provider of ONNX Runtime.

    Attributes:
        execution_provider: what ONNX Runtime calls it.
        package: that has it.
        install: command that installs the package.
        plugin: module of its plug-in package; None where it is part of ONNX Runtime.
        hardware: types of device that it is used on, such as ``GPU``; empty for a built-in one.
        device: where inputs and outputs lie, as ONNX Runtime's IO binding calls it.
        captures: it can record runs of a repeated shape as CUDA graphs.
        limits_memory: it has a setting for the most memory of the device that it takes.
        settings: the provider's own options.
    """

    execution_provider: str
    package: str
    install: str
    plugin: str | None = None
    hardware: tuple[str, ...] = ()
    device: str = "cpu"
    captures: bool = False
    limits_memory: bool = False
    settings: Callable[[ProviderOptions], dict[str, str]] = lambda options: {}

    @property
    def uses_gpu(self) -> bool:
        """True if it computes on a GPU."""
        return self.device == "cuda" or "GPU" in self.hardware

    @property
    def is_installed(self) -> bool:
        """True if its package is there; its library may still not load."""
        if self.plugin is not None:
            return find_spec(self.plugin) is not None
        if self.execution_provider == _CPU_PROVIDER:
            return True
        import onnxruntime

        if not hasattr(onnxruntime, "get_available_providers"):  # what a session explains
            return True
        return self.execution_provider in onnxruntime.get_available_providers()


def _openvino_settings(options: ProviderOptions) -> dict[str, str]:
    # By itself OpenVINO computes in bf16 where the processor can, and rounds what is multiplied by
    # weights of 8 bits to 8 bits as well: both lose accuracy.
    facts: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    if options.threads is not None:
        facts["INFERENCE_NUM_THREADS"] = options.threads
    return {"load_config": json.dumps({"CPU": facts})}


def _cuda_settings(options: ProviderOptions) -> dict[str, str]:
    settings = {"arena_extend_strategy": "kSameAsRequested"}
    if options.vram_budget is not None:
        settings["gpu_mem_limit"] = str(options.vram_budget)
    if options.captures:
        settings["enable_cuda_graph"] = "1"
    return settings


PROVIDERS: Mapping[str, Provider] = {
    CPU: Provider(
        execution_provider=_CPU_PROVIDER, package="onnxruntime", install="pip install onnxruntime"
    ),
    "cuda": Provider(
        execution_provider="CUDAExecutionProvider",
        package="onnxruntime-gpu in the place of onnxruntime",
        install="pip install --force-reinstall --no-deps onnxruntime-gpu",
        device="cuda",
        captures=True,
        limits_memory=True,
        settings=_cuda_settings,
    ),
    "openvino": Provider(
        execution_provider="OpenVINOExecutionProvider",
        package="onnxruntime-ep-openvino",
        install="pip install 'wanx[openvino]'",
        plugin="onnxruntime_ep_openvino",
        hardware=("CPU",),
        settings=_openvino_settings,
    ),
    "tensorrt-rtx": Provider(
        execution_provider="NvTensorRTRTXExecutionProvider",
        package="onnxruntime-ep-nv-tensorrt-rtx-cu13",
        install="pip install 'wanx[tensorrt-rtx]'",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        hardware=("GPU",),
    ),
    "webgpu": Provider(
        execution_provider="WebGpuExecutionProvider",
        package="onnxruntime-ep-webgpu",
        install="pip install 'wanx[webgpu]'",
        plugin="onnxruntime_ep_webgpu",
        hardware=("GPU",),
    ),
}
# Components that another provider than the processor's was measured to be faster for, on processors
# of Intel and at the widths of the official networks (docs/performance.md). Narrower ones run for
# less time than it takes to load.
FASTER: Mapping[str, str] = {
    f"vae_{part}_{chunk}": "openvino"
    for part in ("encoder_down", "encoder_mid", "decoder_mid", "decoder_up")
    for chunk in ("first", "rest")
}
_LEAST_WIDTH = 96  # of the VAE's first level
# Providers that `wanx build --target` makes graphs for, beside those of the processor.
OWN_GRAPHS = ("cuda", "openvino")


def check_provider(name: str) -> None:
    """Refuse a provider that there is not.

    Raises:
        UsageError: names the nearest one.
    """
    known = (AUTO, *PROVIDERS)
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"--provider {name} is not available; {hint}choose {', '.join(known)}")


def fastest_provider(component: str, config: ModelConfig) -> str:
    """Name the provider that was measured to be fastest for a component, of those installed.

    Args:
        component: such as ``dit``.
        config: of its model.
    """
    faster = FASTER.get(component, CPU)
    measured = config.vae.base_dim >= _LEAST_WIDTH and _is_intel()
    return faster if measured and PROVIDERS[faster].is_installed else CPU


@functools.cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def require_installed(name: str) -> None:
    """Refuse a provider, or ``auto``, whose package is missing.

    Raises:
        EnvironmentMismatchError: it is not installed.
    """
    provider = PROVIDERS[CPU if name == AUTO else name]
    if not provider.is_installed:
        raise EnvironmentMismatchError(
            f"{name} takes {provider.package}, which is not installed: "
            f"{provider.install} (docs/install.md)"
        )


def add_provider(
    options: onnxruntime.SessionOptions, name: str, settings: ProviderOptions
) -> list[Any] | None:
    """Let sessions with ``options`` run on a provider.

    Returns:
        The ``providers`` that a session takes beside the options; None where they have all.

    Raises:
        EnvironmentMismatchError: its library does not load, or finds no device.
    """
    import onnxruntime

    provider = PROVIDERS[name]
    if name != CPU:
        onnxruntime.set_default_logger_severity(4)  # what fails is raised, or asked for
    if provider.device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()  # those that pip installed; else the system's are tried
    if provider.plugin is None:
        return [(provider.execution_provider, provider.settings(settings))]
    devices = _devices(name)
    options.add_provider_for_devices(devices, provider.settings(settings))
    return None


_registering = threading.Lock()


def _devices(name: str) -> list[Any]:
    """Devices of a plug-in: those of the first type that it is used on."""
    import onnxruntime

    provider = PROVIDERS[name]
    with _registering:
        _register(name)
    for kind in provider.hardware:
        devices = [
            device
            for device in onnxruntime.get_ep_devices()
            if device.ep_name == provider.execution_provider and device.device.type.name == kind
        ]
        if devices:
            return devices
    raise EnvironmentMismatchError(
        f"{name} finds no {' or '.join(provider.hardware)} that it can use here; choose another "
        "provider, or cpu"
    )


@functools.cache  # a library is never unloaded: sessions and devices of it may be in use
def _register(name: str) -> None:
    import onnxruntime

    provider = PROVIDERS[name]
    assert provider.plugin is not None
    try:
        path = str(import_module(provider.plugin).get_library_path())
        onnxruntime.register_execution_provider_library(provider.execution_provider, path)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        text = " ".join(str(error).split())
        if "already registered" in text:
            return
        _, _, reason = text.rpartition("with error: ")
        raise EnvironmentMismatchError(
            f"{name} cannot load its library: {reason[:240]}; see docs/install.md"
        ) from error
