"""Sessions on ONNX Runtime."""

from __future__ import annotations

import functools
import logging
import platform
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wanx.bundle.reader import Bundle, Component
from wanx.errors import CorruptInputError, EnvironmentMismatchError, WanxError
from wanx.runtime.onnxruntime_packages import installed_packages, package_fault
from wanx.runtime.sessions.base import NEXT, Array, Session, State
from wanx.runtime.sessions.onnxruntime.assignment import RECORD, report_nodes_left
from wanx.runtime.sessions.onnxruntime.providers import (
    CPU,
    OWN_GRAPHS,
    PROVIDERS,
    ProviderOptions,
    add_provider,
)

if TYPE_CHECKING:
    import onnxruntime

_log = logging.getLogger("wanx.runtime")
NO_OPTIONS = ProviderOptions()
_INTEGER_PRODUCT = b"MatMulIntegerToFloat"
# Features of a processor that adds products of 8 bits in 32 bits at once.
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")


def create_session(
    graph: Path,
    root: Path,
    *,
    threads: int | None = None,
    fold: bool = True,
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
        provider: a row of :data:`PROVIDERS`.
        options: for the provider.

    Raises:
        EnvironmentMismatchError: the provider's library does not load, or finds no device; or files
            of ONNX Runtime are missing.
    """
    import onnxruntime

    if not hasattr(onnxruntime, "InferenceSession"):  # uninstalled with its twin's files
        raise EnvironmentMismatchError(package_fault(installed_packages()) or "reinstall wanx")
    data = graph.read_bytes()
    settings = session_options(root, threads=threads, graph=data)
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
    """A graph on ONNX Runtime, on one of its providers."""

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        *,
        provider: str = CPU,
        fallback: bool = False,
        options: ProviderOptions = NO_OPTIONS,
    ) -> None:
        """Load ``component``; see :func:`wanx.runtime.sessions.open_session`.

        Args:
            bundle: an opened, checked bundle.
            component: such as ``dit``.
            provider: a row of :data:`PROVIDERS`.
            fallback: go on with the processor's own provider where this one fails.
            options: for the provider.
        """
        self._bundle, self._component, self._options = bundle, component, options
        self._fallback = fallback and provider != CPU
        self._constants: dict[str, Array] = {}
        self._session: onnxruntime.InferenceSession | None = None
        try:
            self._open(provider)
        except WanxError as error:
            if not self._fallback:
                raise
            self._fall_back(error)

    @property
    def provider(self) -> str:
        """Name of the provider that runs the graph."""
        return self._provider

    def graph_inputs(self) -> list[tuple[str, str, list[int | str]]]:
        """Name, type and shape of each input, such as ``video``, ``tensor(float)``, ``8*h``."""
        assert self._session is not None, "the session is closed"
        return [(value.name, value.type, value.shape) for value in self._session.get_inputs()]

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Put arrays where the provider computes, once; on the processor nothing is copied."""
        self._constants |= constants
        try:
            self._bound |= {name: self._on_device(value) for name, value in constants.items()}
        except WanxError as error:
            if not self._fallback:
                raise
            self._fall_back(error)  # which binds all constants

    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Run the graph; see :meth:`Session.run`."""
        try:
            return self._run(feeds, state)
        except WanxError as error:
            if not self._fallback:
                raise
            if state is not None:
                with self._explained():
                    state |= {name: on_processor(value) for name, value in state.items()}
            self._fall_back(error)
            return self._run(feeds, state)

    def close(self) -> None:
        """Free the graph and its memory."""
        self._session = None
        self._constants.clear()
        self._bound.clear()

    def _open(self, provider: str) -> None:
        record = self._bundle.manifest.components[self._component]
        engine, lacks_own = _graph_for(record, provider)
        self._provider = provider
        self._device = PROVIDERS[provider].device
        with self._explained():
            self._session = create_session(
                self._bundle.held(engine),
                self._bundle.held(""),
                threads=self._options.threads,
                # Folding would widen weights that others read as they are stored.
                fold=provider == CPU and folds(record),
                provider=provider,
                options=self._options,
            )
        taken = self._session.get_providers()
        if PROVIDERS[provider].execution_provider not in taken:
            raise EnvironmentMismatchError(
                f"ONNX Runtime could not start {provider} for {self._component} and would have "
                f"run it on {', '.join(taken)}: its libraries are missing, or it finds no device; "
                "see docs/install.md"
            )
        if provider != CPU:
            advice = ""
            if lacks_own:
                build = self._bundle.build_command(provider)
                advice = f"`{build}` makes a graph that it takes whole"
            report_nodes_left(self._session, self._component, provider, advice)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._bound = {name: self._on_device(value) for name, value in self._constants.items()}

    def _run(self, feeds: Mapping[str, Array], state: State | None) -> dict[str, Array]:
        import onnxruntime

        assert self._session is not None, "the session is closed"
        values = dict(self._bound)
        if state is not None:
            values |= {name: value for name, value in state.items() if name in self._inputs}
        kept = {name for name in self._outputs if state is not None and name.endswith(NEXT)}
        with self._explained():
            if self._device == "cpu":
                for name, array in feeds.items():
                    values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                results = self._session.run_with_ort_values(self._outputs, values)
            else:
                results = self._run_bound(values, feeds, kept)
            outputs = {}
            for name, value in zip(self._outputs, results, strict=True):
                if name in kept:
                    assert state is not None
                    state[name.removesuffix(NEXT)] = value
                else:
                    outputs[name] = value.numpy()
        return outputs

    def _run_bound(
        self,
        values: Mapping[str, onnxruntime.OrtValue],
        feeds: Mapping[str, Array],
        kept: Collection[str],
    ) -> list[onnxruntime.OrtValue]:
        """Run with outputs in ``kept`` left on the device, and the others in host memory."""
        assert self._session is not None, "the session is closed"
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, self._device if name in kept else "cpu")
        self._session.run_with_iobinding(binding)
        results: list[onnxruntime.OrtValue] = binding.get_outputs()
        binding.clear_binding_inputs()  # outputs keep the binding, and it the state before
        return results

    def _on_device(self, array: Array) -> onnxruntime.OrtValue:
        import onnxruntime

        with self._explained():
            return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _fall_back(self, error: WanxError) -> None:
        _log.warning(
            "%s failed for %s, which goes on on the processor: %s",
            self._provider, self._component, error,
        )  # fmt: skip
        self._fallback = False
        self._session = None
        self._open(CPU)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            if isinstance(error, WanxError):
                raise
            text = " ".join(str(error).split())
            name = self._component
            if isinstance(error, MemoryError) or "bad_alloc" in text or "allocat" in text.lower():
                raise WanxError(
                    f"not enough memory to run {name} ({text[:160]}); choose a smaller size "
                    "or fewer frames"
                ) from error
            if self._provider != CPU:
                raise WanxError(
                    f"{self._provider} cannot run {name}: {text[:240]}; --fallback goes on without "
                    "it, and --provider cpu does without it from the start"
                ) from error
            raise CorruptInputError(
                f"ONNX Runtime cannot run {name}: {text[:240]}; check the bundle with "
                "`wanx verify` or export it again"
            ) from error


def on_processor(value: onnxruntime.OrtValue) -> onnxruntime.OrtValue:
    """Copy a value from a device into the processor's memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy())


def _graph_for(record: Component, provider: str) -> tuple[str, bool]:
    """The graph that a provider runs, and whether one of its own would be better."""
    if provider in record.engines:
        return record.engines[provider], False
    portable = record.graph
    if provider in (CPU, "openvino"):  # which reads the processor's graph better than the portable
        portable = record.engines.get(CPU, portable)
    return portable, provider in OWN_GRAPHS
