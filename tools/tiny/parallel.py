"""Train on two cores as two single-threaded processes that average their gradients.

Both networks are so small that threads inside an operator mostly wait for each other.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

WORKERS = 2


def launch(worker: Callable[[int], None]) -> None:
    """Run ``worker(rank)`` once per core and wait."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = worker, f"file://{folder}/rendezvous"
        spawn(_start, arguments, WORKERS)  # type: ignore[no-untyped-call]


def _start(rank: int, worker: Callable[[int], None], rendezvous: str) -> None:
    # Linux shares processors among sessions first (autogroup): one each, or both get half a share.
    os.setsid()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORKERS)
    worker(rank)
    distributed.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= WORKERS
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
