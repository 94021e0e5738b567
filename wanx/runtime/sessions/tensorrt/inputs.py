"""Inputs of a run: those that a state holds, and those repeated to the batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from wanx.bundle.engine_schedule import EngineSchedule
from wanx.errors import WanxError
from wanx.runtime.sessions.base import Array, State
from wanx.runtime.sessions.device.memory import DeviceTensor


def select_state(schedule: EngineSchedule, state: State | None) -> dict[str, DeviceTensor]:
    """Select the inputs of a schedule among a state.

    Raises:
        WanxError: an engine that does not fit made it.
    """
    inputs = {n: v for n, v in (state or {}).items() if n in schedule.input_dtypes}
    for name, value in inputs.items():
        if not isinstance(value, DeviceTensor) or value.dtype != schedule.input_dtypes[name]:
            raise WanxError(f"the state {name} comes from another kind of engine")
    return inputs


def repeat_to_batch(
    batched: Collection[str], *groups: Mapping[str, Array]
) -> list[dict[str, Array]]:
    """Repeat inputs whose batch axis is 1 to the batch of the others.

    Args:
        batched: names of the inputs whose first axis is the batch.
        groups: inputs by name; all of them together are those of one run.
    """
    batch = max((a.shape[0] for g in groups for n, a in g.items() if n in batched), default=1)
    return [
        {
            name: np.ascontiguousarray(np.broadcast_to(array, (batch, *array.shape[1:])))
            if name in batched
            else array
            for name, array in group.items()
        }
        for group in groups
    ]
