"""Context of a GPU measurement: device, sizes, deadline, measured peaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.sizes import MODELS, SIZES, Model, Size


class DeviceLost(Exception):
    """A sticky CUDA error; the process must be restarted."""


@dataclass(frozen=True, kw_only=True)
class FirstRun:
    """Result of running something for the first time.

    Attributes:
        numerics: distances of its result from the reference.
        error: why there is no result, in one line.
    """

    numerics: dict[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(kw_only=True)
class BenchContext:
    """Circumstances that all measurements of a process share.

    Attributes:
        device: where everything runs.
        folder: for what is compiled.
        table: file of the meta-parameters that tuning finds.
        models: the transformers.
        sizes: the videos.
        gemm: side of the square matrices whose products are the ceilings.
        copy_bytes: bytes of the copy that is a ceiling.
        compiles: whether torch.compile takes part.
        seconds_per_comparison: for the rounds of one comparison.
        deadline: when all has to be over, by :func:`time.time`.
        ceilings: operations or bytes per second, by name, as far as they were measured.
        crashed: by ``item/subject``, what ended the process before; it is not run again.
        note: told the name of a subject before it runs for the first time, and None after it.
        item: name of what is being measured.
    """

    device: torch.device
    folder: Path
    table: Path = Path("gpu-tuned.json")
    models: tuple[Model, ...] = MODELS
    sizes: tuple[Size, ...] = SIZES
    gemm: int = 8192
    copy_bytes: int = 2 << 30
    compiles: bool = True
    seconds_per_comparison: float = 2.0
    deadline: float = float("inf")
    ceilings: dict[str, float] = field(default_factory=dict)
    crashed: Mapping[str, str] = field(default_factory=dict)
    note: Callable[[str | None], None] = lambda subject: None
    item: str = ""

    def left(self) -> float:
        """Seconds until everything has to be over."""
        return self.deadline - time.time()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normally distributed numbers, in 8 bits as far as they go."""
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, device=self.device).to(dtype)
        wide = dtype if dtype.itemsize > 1 else torch.bfloat16
        return torch.randn(shape, device=self.device, dtype=wide).to(dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Free cached memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def first_run(
        self, subject: str, call: Callable[[], Any], check: Callable[[Any], dict[str, float]]
    ) -> FirstRun:
        """Run ``call`` for the first time, and let ``check`` look at its result.

        Raises:
            DeviceLost: it failed in a way from which the device does not recover.
        """
        if reason := self.crashed.get(f"{self.item}/{subject}"):
            return FirstRun(error=reason)
        self.note(subject)
        try:
            result = call()
            self.synchronize()
            numerics = check(result)
        except Exception as error:
            reason = one_line(error)
            if not usable(self.device):
                raise DeviceLost(reason) from error
        else:
            self.note(None)
            return FirstRun(numerics=numerics)
        self.note(None)
        self.release()
        return FirstRun(error=reason)

    def peak_of(self, call: Callable[[], object]) -> int | None:
        """Bytes that ``call`` takes beyond what is held already; None on a processor."""
        if self.device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def no_metrics(result: object) -> dict[str, float]:
    """Check of a result that has no reference: no metrics."""
    return {}


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]:.300}" if text else type(error).__name__


def usable(device: torch.device) -> bool:
    """Check that the device still computes: after an illegal access it never does again."""
    if device.type != "cuda":
        return True
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True
