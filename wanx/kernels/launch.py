"""Choice between a Triton kernel and its reference, by what the kernel's arguments allow.

Without Triton, kernels are plain functions that nobody calls, so every op can be imported and run
by its reference anywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import wrap_triton
from torch.torch_version import TorchVersion

from wanx.config.number_formats import FP8
from wanx.errors import WanxError

try:
    import triton
    import triton.language as tl
except ImportError:
    tl = None
    # PyTorch says so at each op, when all that one wants may be to export.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

    def jit(function: Any) -> Any:
        """Leave a kernel that cannot be compiled as it is."""
        return function
else:
    jit = triton.jit

__all__ = [
    "capture_launches",
    "jit",
    "launch",
    "next_power_of_two",
    "runs_reference",
    "sm_of",
    "tl",
    "unsupported_tensors",
    "unsupported_tma",
    "without_tma",
]

MIN_CAPABILITY = (8, 0)
MIN_CAPABILITY_FP8 = divmod(FP8.oldest_sm, 10)
MIN_SM_TMA = 90
# A kernel makes its descriptors itself, in memory that whoever launches it allocates. Those that
# come from outside, TensorDescriptor, are lost where wrap_triton is traced without Dynamo, as
# torch.export does. For the memory programs of AOTInductor before 2.12 allocate what one block of
# threads needs, whatever the grid, and the others would write beyond it.
PROGRAMS_HAVE_TMA = TorchVersion(torch.__version__) >= "2.12"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("wanx.kernels")
_on_launch: Callable[..., None] | None = None
_target = 90


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a kernel; compilers that trace the op see the kernel itself.

    Args:
        kernel: what :data:`jit` made.
        grid: programs along each axis.
        args: tensors and numbers, in the kernel's order.
        meta: its ``constexpr`` parameters, and ``num_warps`` and ``num_stages``.
    """
    if _on_launch is not None:
        _on_launch(kernel, grid, args, meta)
    else:
        if meta.get("TMA"):
            triton.set_allocator(_allocate)
        wrap_triton(kernel)[grid](*args, **meta)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for descriptors; PyTorch's own is aligned to more than they need."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")


@contextmanager
def capture_launches(on_launch: Callable[..., None], sm: int) -> Iterator[None]:
    """Call ``on_launch`` instead of running kernels, whose GPU is taken to be ``sm``.

    Tensors need no memory meanwhile. Of several within each other the innermost is called.
    """
    global _on_launch, _target
    before = _on_launch, _target
    _on_launch, _target = on_launch, sm
    try:
        yield
    finally:
        _on_launch, _target = before


def sm_of(tensor: Tensor) -> int:
    """The GPU that a kernel with ``tensor`` will run on, such as 90."""
    if _on_launch is not None:
        return _target
    if not tensor.is_cuda:
        return 90  # interpreted
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def runs_reference(op: str, reason: str | None, *tensors: Tensor) -> bool:
    """True if the reference of ``op`` has to run instead of its kernel.

    On the processor that is no news. Elsewhere the ``reason`` is logged, once each.

    Raises:
        WanxError: there is a reason, and ``WANX_STRICT=1`` asks for kernels or nothing.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return True
    if reason is None:
        return False
    if os.environ.get("WANX_STRICT") == "1":
        raise WanxError(
            f"the kernel of wanx::{op} cannot run: {reason}; unset WANX_STRICT to run PyTorch's "
            "operators instead"
        )
    _warn_once(op, reason)
    return True


@cache
def _warn_once(op: str, reason: str) -> None:
    _log.warning("wanx::%s runs as PyTorch operators, which is slower: %s", op, reason)


def unsupported_tensors(*tensors: Tensor, fp8: bool = False, triton: bool = True) -> str | None:
    """Problem with the device or the layout of a kernel's tensors, or None.

    Args:
        tensors: all of a kernel's tensors; each row, their last axis, must be contiguous.
        fp8: whether the kernel makes or takes float8_e4m3fn.
        triton: whether Triton compiles it.
    """
    if triton and tl is None:
        return "Triton is not installed: pip install 'wanx[gpu]'"
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        return f"its tensors are on {' and '.join(sorted(devices))}"
    if not tensors[0].is_cuda:
        return f"it runs on NVIDIA GPUs, not on {tensors[0].device.type}"
    capability = torch.cuda.get_device_capability(tensors[0].device)
    minimum = MIN_CAPABILITY_FP8 if fp8 else MIN_CAPABILITY
    if capability < minimum:
        what = "FP8 needs" if fp8 else "it needs"
        major, minor = capability
        return f"{what} SM{minimum[0]}{minimum[1]} or newer, this GPU is SM{major}{minor}"
    for tensor in tensors:
        if tensor.ndim and tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            return f"rows of {list(tensor.shape)} are not contiguous (stride {tensor.stride(-1)})"
    return None


def unsupported_tma(*tensors: Tensor) -> str | None:
    """Reason why kernels cannot use TMA for these tensors, or None.

    Args:
        tensors: those that a kernel describes by rows, which are contiguous.
    """
    sm = sm_of(tensors[0])
    if sm < MIN_SM_TMA:
        return f"TMA needs SM{MIN_SM_TMA} or newer, this GPU is SM{sm}"
    traced = is_fake(tensors[0])
    if traced and not PROGRAMS_HAVE_TMA:
        return f"programs with TMA need PyTorch 2.12 or newer, this is {torch.__version__}"
    for tensor in tensors:
        # A size that is left open counts where it is a multiple whatever it is.
        offsets = (tensor.storage_offset(), *tensor.stride()[:-1])
        if not all(statically_known_true(n * tensor.itemsize % 16 == 0) for n in offsets):
            return f"rows of {list(tensor.shape)} do not all start at multiples of 16 bytes"
        if not traced and tensor.data_ptr() % 16:
            return f"{list(tensor.shape)} does not start at a multiple of 16 bytes"
    return None


def without_tma(meta: dict[str, int]) -> dict[str, int]:
    """The nearest meta-parameters for where TMA is not supported."""
    # Hopper's specialised warps are two groups of num_warps that share the queries.
    warps = max(meta["num_warps"], 8 if meta["WARP_SPECIALIZE"] else 1)
    return meta | {"TMA": 0, "WARP_SPECIALIZE": 0, "num_warps": warps}


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()
