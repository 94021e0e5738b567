"""Base of sessions on compiled programs, whatever compiled them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from wanx.bundle.engine_schedule import EngineSchedule
from wanx.bundle.reader import Bundle
from wanx.errors import CorruptInputError, WanxError
from wanx.runtime.sessions.base import Array, Session

RUNS_BEFORE_CAPTURE = 2  # runs of a shape before its CUDA graph is captured
MAX_CACHED_SHAPES = 4  # kept at a time, as each holds memory of its own


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """Time of a kernel, or a layer, in all its calls.

    Attributes:
        program: that it belongs to; empty where the backend does not say.
        name: as the backend calls it.
        calls: number of them.
        seconds: all together.
    """

    program: str
    name: str
    calls: int
    seconds: float


class EngineSession(Session):
    """A component as compiled programs, called in the order of a schedule.

    Attributes:
        bundle: it is of.
        component: its name.
        target: what its programs were built for, such as ``aoti``.
    """

    bundle: Bundle
    component: str
    target: str

    @property
    @abstractmethod
    def schedule(self) -> EngineSchedule:
        """The programs and steps that run."""

    @abstractmethod
    def kernel_times(self, call: Callable[[], object]) -> list[KernelTime]:
        """Measure the kernels that ``call``, which runs this session, makes run.

        Meanwhile a captured CUDA graph runs as single programs, where only those report their
        kernels.
        """

    def run_each(self, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Run on each of ``feeds``, as one batch where that was measured to be faster."""
        if len(feeds) < 2 or feeds[0]["tokens"].shape[1] > self.schedule.max_batched_tokens:
            return super().run_each(feeds)
        batch = self.run(
            {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        )
        return [
            {name: value[index : index + 1] for name, value in batch.items()}
            for index in range(len(feeds))
        ]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a backend raises into one line that says what to do."""
        try:
            yield
        except WanxError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            if "out of memory" in text.lower() or isinstance(error, MemoryError):
                raise WanxError(
                    f"not enough memory on the device for {self.component} ({text:.160}); choose a "
                    "smaller size or fewer frames, or export with --precision fp8"
                ) from error
            raise WanxError(
                f"the engine of {self.component} failed ({text:.240}); "
                f"`{self.bundle.build_command(self.target, force=True)}` makes it again, and "
                f"`{self.bundle.build_command('cpu')}` does without it"
            ) from error


def dead_after_step(schedule: EngineSchedule, outputs: Iterable[str]) -> list[list[str]]:
    """Liveness: values that can be freed after each step; ``outputs`` never."""
    last_use: dict[str, int] = {}
    for number, step in enumerate(schedule.steps):
        last_use |= dict.fromkeys((*step.inputs, *step.outputs), number)
    kept = set(outputs)
    return [
        [name for name, last in last_use.items() if last == number and name not in kept]
        for number in range(len(schedule.steps))
    ]


def missing_weight(component: str, name: str) -> CorruptInputError:
    """Error for a weight that a schedule reads and the bundle lacks."""
    return CorruptInputError(
        f"the weights of {component} lack {name!r}, which its engine reads; export it again"
    )


def misshaped_weight(
    component: str, name: str, actual: Sequence[object], expected: Sequence[object]
) -> CorruptInputError:
    """Error for a weight that is not what the engine was built for."""
    return CorruptInputError(
        f"{name!r} is {list(actual)} in the weights of {component}, its engine wants "
        f"{list(expected)}; export it again"
    )
