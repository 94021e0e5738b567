"""What runs a graph: the only part of the runtime that differs by backend."""

from __future__ import annotations

from importlib.util import find_spec

from wanx.bundle import Bundle
from wanx.errors import EnvironmentMismatchError
from wanx.runtime.sessions.base import Session


def open_session(bundle: Bundle, component: str, *, threads: int | None = None) -> Session:
    """Load a component of a bundle on the backend that it was exported for.

    Args:
        bundle: an opened, checked bundle.
        component: such as ``dit``.
        threads: threads of the processor; None takes all cores.

    Raises:
        WanxError: the backend cannot load the component.
    """
    engines = bundle.manifest.components[component].engines
    if bundle.manifest.target == "aoti" and "aoti" in engines:
        if find_spec("torch") is None:
            raise EnvironmentMismatchError(
                f"the engines of {bundle.root} need PyTorch, which is not installed; "
                "pip install 'wanx[export]'"
            )
        from wanx.runtime.sessions.aoti import AotiSession

        return AotiSession(bundle, component, threads=threads)
    from wanx.runtime.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(bundle, component, threads=threads)
