"""What runs a graph: the only part of the runtime that differs by backend."""

from __future__ import annotations

from wanx.bundle import Bundle
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
    from wanx.runtime.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(bundle, component, threads=threads)
