"""Loader of TensorRT engines, and its log of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanx.errors import CorruptInputError, EnvironmentMismatchError
from wanx.runtime.sessions.tensorrt.plugin import register


class TensorRTError(Exception):
    """A call of TensorRT that failed."""


class Loader:
    """One of the two TensorRTs on one GPU."""

    def __init__(self, trt: Any, sm: str, rebuild: str) -> None:
        """Load with the module ``trt``.

        Args:
            trt: ``tensorrt`` or ``tensorrt_rtx``.
            sm: the GPU, such as ``sm89``.
            rebuild: the command that builds the engines again.
        """
        self.trt = trt
        self.sm = sm
        self.rebuild = rebuild
        self._plugins = register(trt)
        self.log = _log(trt)
        self._runtime = trt.Runtime(self.log)

    def load(self, path: Path) -> Any:
        """Load the engine in a file.

        Raises:
            EnvironmentMismatchError: it was made for something else than this machine.
            CorruptInputError: it is damaged.
            TensorRTError: there is too little memory.
        """
        data = path.read_bytes()
        self.log.clear()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is not None:
            return engine
        problem = self._plugins.problem or self.log.first_error()
        reasons = self._reasons(data)
        if "INSUFFICIENT_GPU_MEMORY" in reasons or "out of memory" in problem.lower():
            raise TensorRTError(f"out of memory for {path.name}: {problem}")
        if reasons and "MALFORMED_ENGINE" not in reasons:
            raise EnvironmentMismatchError(
                f"{path}: TensorRT {self.trt.__version__} cannot run this engine on {self.sm}: "
                f"{', '.join(reasons)} ({problem}); run `{self.rebuild} --force`"
            )
        raise CorruptInputError(
            f"{path}: TensorRT does not load this engine: {problem}; run `{self.rebuild} --force`"
        )

    def _reasons(self, data: bytes) -> list[str]:
        """Diagnose an engine that does not load, where this TensorRT can."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return []
        _, bits = self._runtime.get_engine_validity(data)
        members = self.trt.EngineInvalidityDiagnostics.__members__
        return [name for name, member in members.items() if int(bits) & int(member)]


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Errors; the first one says what is wrong, the others what follows from it."""

        def __init__(self) -> None:
            super().__init__()
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and len(self._errors) < 16:
                self._errors.append(" ".join(message.split()))

        def clear(self) -> None:
            self._errors.clear()

        def first_error(self) -> str:
            return f"{self._errors[0]:.300}" if self._errors else "it gave no reason"

    return Log()
