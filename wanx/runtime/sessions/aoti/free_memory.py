"""Memory of the GPU that PyTorch sees."""

from __future__ import annotations

import torch


def free_memory() -> int | None:
    """Bytes that nobody uses; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return int(free)
