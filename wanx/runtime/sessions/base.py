"""Interface of sessions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

Array = NDArray[Any]
# Values that stay where the backend computes, by input name; opaque to everybody else.
State = dict[str, Any]
NEXT = "_next"


class Session(ABC):
    """One loaded graph; a context manager that frees it.

    An output called ``<input>_next`` is state: it stays on the device, in the ``state`` that the
    caller passes along, and is what ``<input>`` gets in the following run.
    """

    @abstractmethod
    def bind(self, constants: Mapping[str, Array]) -> None:
        """Put inputs on the device that stay the same from run to run."""

    @abstractmethod
    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Run the graph.

        Args:
            feeds: the inputs that are neither bound nor state, as numpy arrays.
            state: read for the inputs it holds, and updated with the outputs that are state, which
                may overwrite them.

        Returns:
            The other outputs by name.

        Raises:
            WanxError: the backend failed, for instance for want of memory.
        """

    def run_each(self, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Run the graph on each of ``feeds``, which differ in their values alone.

        Returns:
            As :meth:`run`, for each of them.

        Raises:
            WanxError: as :meth:`run`.
        """
        return [self.run(feed) for feed in feeds]

    @abstractmethod
    def close(self) -> None:
        """Free the graph and its memory."""

    def __enter__(self) -> Self:
        """Return the session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Free the graph."""
        self.close()


# By component, and options of its session; frees it at the end.
OpenSession = Callable[..., AbstractContextManager[Session]]
