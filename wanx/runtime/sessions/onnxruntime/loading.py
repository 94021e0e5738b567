"""Loading of graphs: options of ONNX Runtime's sessions, and what is folded."""

from __future__ import annotations

import ctypes
import functools
import platform
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wanx.bundle.reader import Component
from wanx.errors import EnvironmentMismatchError
from wanx.files.hub_cache import without_links
from wanx.runtime.onnxruntime_packages import installed_packages, package_fault
from wanx.runtime.sessions.onnxruntime.assignment import RECORD
from wanx.runtime.sessions.onnxruntime.providers import CPU, ProviderOptions, add_provider

if TYPE_CHECKING:
    import onnxruntime

NO_OPTIONS = ProviderOptions()
_M_MMAP_THRESHOLD = -3  # of malloc.h
_INTEGER_PRODUCT = b"MatMulIntegerToFloat"
# Features of a processor that adds products of 8 bits in 32 bits at once.
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")


def create_session(
    graph: Path,
    root: Path,
    *,
    threads: int | None = None,
    fold: bool = True,
    in_order: bool = False,
    provider: str = CPU,
    options: ProviderOptions = NO_OPTIONS,
) -> onnxruntime.InferenceSession:
    """Load a graph on ONNX Runtime.

    Args:
        graph: the ONNX file.
        root: the folder that its locations of weights are relative to.
        threads: of the processor; None takes all cores.
        fold: compute constant expressions once. With weights stored in 16 bits that would compute
            the Cast behind each of them and keep the wide copies.
        in_order: run the nodes in the graph's own order. ONNX Runtime's leaves what nothing waits
            for, such as the state of a layer, to the end, and until then all that it is cut from.
            In the graph's own, all weights in 16 bits would be widened first.
        provider: a row of :data:`PROVIDERS`.
        options: for the provider.

    Raises:
        EnvironmentMismatchError: the provider's library does not load, or finds no device; or files
            of ONNX Runtime are missing.
    """
    import onnxruntime

    if not hasattr(onnxruntime, "InferenceSession"):  # uninstalled with its twin's files
        raise EnvironmentMismatchError(package_fault(installed_packages()) or "reinstall wanx")
    root, data = without_links(root, graph.read_bytes())
    settings = session_options(root, threads=threads, graph=data)
    settings.enable_cpu_mem_arena = options.arena
    if not options.arena:
        _return_freed_memory()
    if in_order:
        settings.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if provider != CPU:
        settings.add_session_config_entry(RECORD, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a provider that is dropped, which is an error here
        return onnxruntime.InferenceSession(
            data,
            settings,
            providers=add_provider(settings, provider, options),
            disabled_optimizers=None if fold else ["ConstantFolding"],
            enable_fallback=0,  # which would say so on standard output, and lose the reason
        )


def session_options(
    root: Path, *, threads: int | None = None, graph: bytes = b""
) -> onnxruntime.SessionOptions:
    """Options of every session; see :func:`create_session`.

    Args:
        root: the folder that locations of weights are relative to.
        threads: of the processor; None takes all cores.
        graph: the serialised model, whose integer products shall be exact on any processor.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well as logged
    # Else a repeated shape gets one block for all of its values, beside what the first run left.
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(root)
    )
    # Unsigned times signed saturates there; so ONNX Runtime shifts the weights to unsigned too.
    # Other graphs stay as they are: it would take their 8-bit tables for weights of a product.
    if _INTEGER_PRODUCT in graph and _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


@functools.cache
def _return_freed_memory() -> None:
    """Have glibc give blocks from 1 MiB on back to the system when they are freed.

    By itself it raises the limit to what was freed last, up to 32 MiB, and keeps smaller blocks,
    between which ever larger ones no longer fit.
    """
    with suppress(OSError, AttributeError):  # another library of C
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@functools.cache
def _saturates() -> bool:
    """True if this processor adds pairs of 8-bit products in 16 bits: x86 without VNNI or AMX."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        features = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # unknown: rather slow than wrong
        return True
    return not any(feature in features for feature in _WIDE_SUMS)


def folds(record: Component) -> bool:
    """Decide if a component's constants are folded; see :func:`create_session`.

    Integer products need their scales folded; what is left in 16 bits is small then.
    """
    return record.quantization is not None or all(dtype == "F32" for dtype in record.storage)
