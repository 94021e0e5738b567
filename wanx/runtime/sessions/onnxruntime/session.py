"""Sessions on ONNX Runtime."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from wanx.bundle.reader import Bundle, Component
from wanx.errors import CorruptInputError, EnvironmentMismatchError, WanxError
from wanx.runtime.sessions.base import NEXT, Array, Session, State
from wanx.runtime.sessions.onnxruntime.assignment import nodes_left, report_nodes_left
from wanx.runtime.sessions.onnxruntime.captured_runs import (
    REFUSED_CAPTURE,
    CapturedRuns,
    run_options,
)
from wanx.runtime.sessions.onnxruntime.loading import NO_OPTIONS, create_session, folds
from wanx.runtime.sessions.onnxruntime.providers import (
    CPU,
    OWN_GRAPHS,
    PROVIDERS,
    ProviderOptions,
)

if TYPE_CHECKING:
    import onnxruntime

REPEATED = ("dit",)  # components that run many times with the same shapes

_log = logging.getLogger("wanx.runtime")


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
        self._bound: dict[str, onnxruntime.OrtValue] = {}
        self._captured: CapturedRuns | None = None
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

    def nodes_left(self) -> tuple[Counter[str], int]:
        """Nodes that run on the processor's own provider, by operator, and the number of all."""
        assert self._session is not None, "the session is closed"
        return nodes_left(self._session)

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Put arrays where the provider computes, once; on the processor nothing is copied."""
        self._constants |= constants
        try:
            for name, value in constants.items():
                self._bind_one(name, value)
        except WanxError as error:
            if not self._fallback:
                raise
            self._fall_back(error)  # which binds all constants

    def _bind_one(self, name: str, array: Array) -> None:
        known = self._bound.get(name)
        if self._captured is not None and known is not None:
            if known.shape() == list(array.shape):
                with self._explained():
                    known.update_inplace(array)  # as graphs read it there
                return
            self._captured.forget()
        self._bound[name] = self._on_device(array)

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
        self._close_session()
        self._constants.clear()

    def _close_session(self) -> None:
        self._captured = None
        self._bound.clear()
        self._session = None

    def _open(self, provider: str, *, captures: bool = True) -> None:
        record = self._bundle.manifest.components[self._component]
        engine, lacks_own = _graph_for(record, provider)
        self._provider = provider
        self._device = PROVIDERS[provider].device
        self._captured = None
        captures = captures and PROVIDERS[provider].captures and self._component in REPEATED
        with self._explained():
            try:
                self._session = self._create(engine, captures)
            except Exception as error:  # ONNX Runtime's exceptions share no base of their own
                if not captures or REFUSED_CAPTURE not in str(error):
                    raise
                _log.info("ONNX Runtime makes no CUDA graph of %s", self._component)
                captures = False
                self._session = self._create(engine, captures)
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
        if captures:
            self._captured = CapturedRuns(self._session, self._device)
        self._bound = {name: self._on_device(value) for name, value in self._constants.items()}

    def _create(self, engine: str, captures: bool) -> onnxruntime.InferenceSession:
        record = self._bundle.manifest.components[self._component]
        return create_session(
            self._bundle.held(engine),
            self._bundle.held(""),
            threads=self._options.threads,
            # Folding would widen weights that others read as they are stored.
            fold=self._provider == CPU and folds(record),
            in_order=any(name.endswith(NEXT) for name in record.outputs),
            provider=self._provider,
            options=replace(self._options, captures=captures),
        )

    def _run(self, feeds: Mapping[str, Array], state: State | None) -> dict[str, Array]:
        import onnxruntime

        assert self._session is not None, "the session is closed"
        if self._captured is not None and state is None:
            return self._run_repeated(self._captured, feeds)
        values = dict(self._bound)
        if state is not None:
            values |= {name: value for name, value in state.items() if name in self._inputs}
        kept = {name for name in self._outputs if state is not None and name.endswith(NEXT)}
        with self._explained():
            if self._provider == CPU and kept and kept <= {f"{name}{NEXT}" for name in values}:
                results = self._run_bound(values, feeds, kept, in_place=True)
            elif self._device == "cpu":
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

    def _run_repeated(self, captured: CapturedRuns, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run, and as a CUDA graph where the shapes repeat."""
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        try:
            outputs = captured.replay(arrays)
        except Exception as error:  # too little memory, or a kernel that cannot be captured
            _log.warning(
                "no CUDA graph is made of %s (%s): every step launches its kernels",
                self._component, " ".join(str(error).split())[:160],
            )  # fmt: skip
            self._close_session()
            self._open(self._provider, captures=False)
            return self._run(feeds, None)
        if outputs is not None:
            return outputs
        with self._explained():
            results = self._run_bound(self._bound, arrays, ())
            outputs = dict(zip(self._outputs, (value.numpy() for value in results), strict=True))
            captured.note(arrays, outputs, self._bound)
        return outputs

    def _run_bound(
        self,
        values: Mapping[str, onnxruntime.OrtValue],
        feeds: Mapping[str, Array],
        kept: Collection[str],
        *,
        in_place: bool = False,
    ) -> list[onnxruntime.OrtValue]:
        """Run with outputs in ``kept`` left on the device, and the others in host memory.

        With ``in_place`` they overwrite what they follow: a graph takes them from what it joined
        the state before with, so it has read that by then.
        """
        assert self._session is not None, "the session is closed"
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            if in_place and name in kept:
                binding.bind_ortvalue_output(name, values[name.removesuffix(NEXT)])
            else:
                binding.bind_output(name, self._device if name in kept else "cpu")
        options = None if self._captured is None else run_options(None)
        self._session.run_with_iobinding(binding, options)
        results: list[onnxruntime.OrtValue] = binding.get_outputs()
        binding.clear_binding_inputs()  # outputs keep the binding, and it the state before
        return results

    def _on_device(self, array: Array) -> onnxruntime.OrtValue:
        import onnxruntime

        if self._captured is not None:
            array = array.copy()  # it is overwritten by the next one, where no device copies it
        with self._explained():
            return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _fall_back(self, error: WanxError) -> None:
        _log.warning(
            "%s failed for %s, which goes on on the processor: %s",
            self._provider, self._component, error,
        )  # fmt: skip
        self._fallback = False
        self._close_session()
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
