"""What runs a graph: the only part of the runtime that differs by backend."""

from __future__ import annotations

from importlib.util import find_spec

from wanx.bundle.reader import Bundle
from wanx.errors import EnvironmentMismatchError
from wanx.runtime.sessions.base import Session


def open_session(
    bundle: Bundle,
    component: str,
    *,
    threads: int | None = None,
    vram_budget: int | None = None,
) -> Session:
    """Load a component of a bundle on the backend that it was exported for.

    Args:
        bundle: an opened, checked bundle.
        component: such as ``dit``.
        threads: threads of the processor; None takes all cores.
        vram_budget: most bytes of the GPU's memory to take, for engines of TensorRT; None takes
            what is free.

    Raises:
        WanxError: the backend cannot load the component.
    """
    target = bundle.manifest.target
    if target in bundle.manifest.components[component].engines:
        if target == "aoti":
            if find_spec("torch") is None:
                raise EnvironmentMismatchError(
                    f"the engines of {bundle.root} need PyTorch, which is not installed; "
                    "pip install 'wanx[export]'"
                )
            from wanx.runtime.sessions.aoti.session import AotiSession

            return AotiSession(bundle, component, threads=threads)
        if target in ("rtx", "tensorrt"):
            from wanx.runtime.sessions.tensorrt.session import TensorRTSession

            return TensorRTSession(bundle, component, threads=threads, vram_budget=vram_budget)
    from wanx.runtime.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(bundle, component, threads=threads)
