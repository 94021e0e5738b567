"""Sessions on ONNX Runtime, on the processor."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wanx.bundle.reader import Bundle, Component
from wanx.errors import CorruptInputError, WanxError
from wanx.runtime.sessions.base import NEXT, Array, Session, State

if TYPE_CHECKING:
    import onnxruntime

_INTEGER_PRODUCT = b"MatMulIntegerToFloat"
# Features of a processor that adds products of 8 bits in 32 bits at once.
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")


def create_session(
    graph: Path, root: Path, *, threads: int | None = None, fold: bool = True
) -> onnxruntime.InferenceSession:
    """Load a graph on ONNX Runtime's CPU provider.

    Args:
        graph: the ONNX file.
        root: the folder that its locations of weights are relative to.
        threads: of the processor; None takes all cores.
        fold: compute constant expressions once. With weights stored in 16 bits that would compute
            the Cast behind each of them and keep the wide copies.
    """
    import onnxruntime

    data = graph.read_bytes()
    return onnxruntime.InferenceSession(
        data,
        session_options(root, threads=threads, graph=data),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=None if fold else ["ConstantFolding"],
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


class OnnxRuntimeSession(Session):
    """A graph on ONNX Runtime's CPU provider."""

    def __init__(self, bundle: Bundle, component: str, *, threads: int | None = None) -> None:
        """Load ``component``; see :func:`wanx.runtime.sessions.open_session`."""
        record = bundle.manifest.components[component]
        self._name = component
        with self._explained():
            self._session: onnxruntime.InferenceSession | None = create_session(
                bundle.held(record.engines.get("cpu", record.graph)),
                bundle.held(""),
                threads=threads,
                fold=folds(record),
            )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._constants: dict[str, onnxruntime.OrtValue] = {}

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Wrap the arrays once; on the processor nothing is copied."""
        import onnxruntime

        self._constants |= {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value)
            for name, value in constants.items()
        }

    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Run the graph; see :meth:`Session.run`."""
        import onnxruntime

        assert self._session is not None, "the session is closed"
        values = dict(self._constants)
        if state is not None:
            values |= {name: value for name, value in state.items() if name in self._inputs}
        for name, array in feeds.items():
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        with self._explained():
            results = self._session.run_with_ort_values(self._outputs, values)
        outputs = {}
        for name, value in zip(self._outputs, results, strict=True):
            if state is not None and name.endswith(NEXT):
                state[name.removesuffix(NEXT)] = value
            else:
                outputs[name] = value.numpy()
        return outputs

    def close(self) -> None:
        """Free the graph and its memory."""
        self._session = None
        self._constants.clear()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            if isinstance(error, WanxError):
                raise
            text = " ".join(str(error).split())
            if isinstance(error, MemoryError) or "bad_alloc" in text or "allocat" in text.lower():
                raise WanxError(
                    f"not enough memory to run {self._name} ({text[:160]}); choose a smaller size "
                    "or fewer frames"
                ) from error
            raise CorruptInputError(
                f"ONNX Runtime cannot run {self._name}: {text[:240]}; check the bundle with "
                "`wanx verify` or export it again"
            ) from error
