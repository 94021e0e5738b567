"""What sessions on compiled programs share, whatever compiled them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from wanx.bundle.engine_schedule import Plan
from wanx.errors import CorruptInputError, WanxError
from wanx.runtime.sessions.base import Array, Session

WARM_UPS = 2  # runs of a shape before it is recorded
MOST_SHAPES = 4  # kept at a time, as each holds memory of its own


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """What a kernel, or a layer, took in all its calls.

    Attributes:
        program: that it belongs to; empty where the backend does not tell.
        name: as the backend calls it.
        calls: how often it ran.
        seconds: all together.
    """

    program: str
    name: str
    calls: int
    seconds: float


class EngineSession(Session):
    """A component as compiled programs, called in the order of a plan.

    Attributes:
        component: its name.
        target: what its programs were built for, such as ``aoti``.
    """

    component: str
    target: str

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """What runs."""

    @abstractmethod
    def kernel_times(self, call: Callable[[], object]) -> list[KernelTime]:
        """Measure the kernels that ``call``, which runs this session, makes run.

        What was recorded as one CUDA graph runs as single programs meanwhile, where only those tell
        their kernels.
        """

    def run_each(self, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Run on each of ``feeds``, as one batch where building found that to be faster."""
        if len(feeds) < 2 or feeds[0]["tokens"].shape[1] > self.plan.batch_limit:
            return super().run_each(feeds)
        made = self.run({name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
        return [
            {name: value[index : index + 1] for name, value in made.items()}
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
                f"the engine of {self.component} failed ({text:.240}); `wanx build --target "
                f"{self.target}` makes it again, and --target cpu does without it"
            ) from error


def last_use(plan: Plan, outputs: Iterable[str]) -> list[list[str]]:
    """After which step each value is needed no more; ``outputs`` are needed to the end."""
    last: dict[str, int] = {}
    for number, step in enumerate(plan.steps):
        last |= dict.fromkeys((*step.inputs, *step.outputs), number)
    kept = set(outputs)
    return [
        [name for name, place in last.items() if place == number and name not in kept]
        for number in range(len(plan.steps))
    ]


def missing_weight(component: str, name: str) -> CorruptInputError:
    """The error for a weight that a plan reads and the bundle lacks."""
    return CorruptInputError(
        f"the weights of {component} lack {name!r}, which its engine reads; export it again"
    )


def misshaped_weight(
    component: str, name: str, found: Sequence[object], wanted: Sequence[object]
) -> CorruptInputError:
    """The error for a weight that is not what the engine was built for."""
    return CorruptInputError(
        f"{name!r} is {list(found)} in the weights of {component}, its engine wants "
        f"{list(wanted)}; export it again"
    )
