"""TeaCache (Liu et al. 2024) for models whose own costs have not been measured.

Its decisions depend on the embedded timesteps alone: the relative change of the embedding from step
to step, through a polynomial that was fitted to the model, accumulates until it reaches a
threshold; there the step is computed. So the schedule is known before the run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from wanx.runtime.sampling.sampler import Float32

# Coefficients for the time embedding, highest power first, from teacache_generate.py of
# ali-vilab/TeaCache. I2V has others at 480P.
_COEFFICIENTS = {
    "t2v-1.3B": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "t2v-14B": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "i2v-14B": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
}
_I2V_480P = (-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289)
_PIXELS_480P = 832 * 480
_BISECTIONS = 60


def coefficients(name: str, pixels: int) -> tuple[float, ...] | None:
    """Published coefficients of a model; None where there are none.

    Args:
        name: of the model, such as ``t2v-14B``.
        pixels: of a frame.
    """
    if name == "i2v-14B" and pixels <= _PIXELS_480P:
        return _I2V_480P
    return _COEFFICIENTS.get(name)


def changes(embedded: Float32, polynomial: Sequence[float]) -> list[float]:
    """Predicted change of the output at each step; 0 at the first.

    Args:
        embedded: timesteps ``[steps, dim]``, float32.
        polynomial: coefficients, highest power first.
    """
    before, now = embedded[:-1], embedded[1:]
    relative = np.abs(now - before).mean(axis=1) / np.abs(before).mean(axis=1)
    return [0.0, *map(float, np.polyval(polynomial, relative.astype(np.float64)))]


def computed_steps(
    predicted: Sequence[float], threshold: float, required: Collection[int] = ()
) -> tuple[int, ...]:
    """Steps at which the change since the last computed one reaches a threshold.

    The first step, the last and those that are ``required`` are computed too.
    """
    steps, error = [], 0.0
    for step, change in enumerate(predicted):
        error += change
        if step in (0, len(predicted) - 1, *required) or error >= threshold:
            steps.append(step)
            error = 0.0
    return tuple(steps)


def steps_within(
    predicted: Sequence[float],
    forwards: Sequence[int],
    budget: int,
    required: Collection[int] = (),
) -> tuple[int, ...] | None:
    """Steps of the lowest threshold that stays within a budget; None where none does.

    Args:
        predicted: change of each step.
        forwards: of the network at each step.
        budget: most forwards.
        required: steps that are computed in any case.
    """

    def fitting(threshold: float) -> tuple[int, ...] | None:
        steps = computed_steps(predicted, threshold, required)
        return steps if sum(forwards[step] for step in steps) <= budget else None

    low, high = 0.0, 1.0 + sum(abs(change) for change in predicted)
    best = fitting(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if (steps := fitting(middle)) is None:
            low = middle
        else:
            best, high = steps, middle
    return best
