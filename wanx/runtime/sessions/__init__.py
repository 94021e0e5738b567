"""Sessions: loaded graphs on a backend, the only part of the runtime that differs by target.

Start with ``base.py`` and ``registry.py``.
"""

from __future__ import annotations

from wanx.bundle.reader import Bundle
from wanx.runtime.sessions.base import Session
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.sessions.registry import SessionOptions, load_component


def open_session(
    bundle: Bundle,
    component: str,
    *,
    threads: int | None = None,
    vram_budget: int | None = None,
    provider: str = AUTO,
    fallback: bool = False,
    arena: bool = True,
) -> Session:
    """Load a component of a bundle on the backend that it was exported for.

    Args:
        bundle: an opened, checked bundle.
        component: such as ``dit``.
        threads: threads of the processor; None takes all cores.
        vram_budget: most bytes of the GPU's memory to take, for engines of TensorRT; None takes
            what is free.
        provider: of ONNX Runtime, such as ``openvino``, which runs the graph whatever the target;
            ``auto`` is the target's own, and of a bundle for the processor what was measured to
            be faster and is installed.
        fallback: go on on the processor where the provider fails.
        arena: keep the memory of values for the next run, which is faster; without it, ONNX
            Runtime on the processor takes no more than they need.

    Raises:
        UsageError: there is no such provider.
        EnvironmentMismatchError: the provider is not installed, or does not start.
        WanxError: the backend cannot load the component.
    """
    options = SessionOptions(
        threads=threads, vram_budget=vram_budget, provider=provider, fallback=fallback, arena=arena
    )
    return load_component(bundle, component, options)
