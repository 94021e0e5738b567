"""Settings of threads while weights are written beside a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread(*, quantizes: bool) -> Iterator[None]:
    """Keep PyTorch to the calling thread, where it quantises.

    Pieces are small, and another core is tracing or hashing: threads that wait for each other took
    several times as long.
    """
    if not quantizes:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Lower the GIL's switch interval, so that tracing does not starve the writer."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
