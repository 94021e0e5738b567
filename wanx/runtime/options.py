"""Options of a run: as the user gave them, and with every one decided for a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.errors import UsageError
from wanx.runtime.sampling.guidance import Guidance, parse_guide_scale, scales_of
from wanx.runtime.sampling.sampler import Draw, Sampler
from wanx.runtime.sampling.solvers import make_sampler

ImageInput = str | os.PathLike[str] | NDArray[np.uint8]


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a text")
    return value


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
    elif isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer():
        number = int(float(value))
    else:
        raise _wrong_type(name, value, "a whole number")
    if number.bit_length() > 64:  # Python refuses to print much longer ones
        raise UsageError(f"{name} has {number.bit_length()} bits; give a number of 64 at most")
    return number


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _wrong_type(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"{name} is over 1e308; give a smaller number") from None


def parse_numbers(name: str, value: object) -> tuple[float, ...]:
    """A list of numbers, or a text of them with commas between."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, np.ndarray)):
        raise _wrong_type(name, value, "numbers with commas between, such as 1000,750,500,250")
    numbers = []
    for item in items:
        try:
            numbers.append(float(item) if isinstance(item, str) else _number(name, item))
        except ValueError:
            raise _wrong_type(name, value, "numbers with commas between") from None
    return tuple(numbers)


def _guide_scale(name: str, value: object) -> float | str:
    return parse_guide_scale(value) if isinstance(value, str) else _number(name, value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong_type(name, value, "true or false")
    return bool(value)


def _file(name: str, value: object) -> str | os.PathLike[str]:
    if isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str):
        return value
    raise _wrong_type(name, value, "the name of a file")


def _image(name: str, value: object) -> ImageInput:
    return value if isinstance(value, np.ndarray) else _file(name, value)


def _images(name: str, value: object) -> tuple[ImageInput, ...]:
    images = (str, os.PathLike, np.ndarray)
    if isinstance(value, (list, tuple)) and all(isinstance(item, images) for item in value):
        return tuple(_image(name, item) for item in value)
    raise _wrong_type(name, value, "a list of names of files")


def _wrong_type(name: str, value: object, expected: str) -> UsageError:
    return UsageError(f"{name} is {' '.join(repr(value).split()):.80}; give {expected}")


# The check of each option's type; it gives the value that is kept.
_CHECKS: dict[str, Callable[[str, object], Any]] = (
    dict.fromkeys(("prompt", "negative_prompt", "solver", "preset", "cache"), _text)
    | dict.fromkeys(("width", "height", "frames", "fps", "steps", "seed"), _whole_number)
    | dict.fromkeys(("shift", "guidance_rescale", "speedup", "vace_scale"), _number)
    | dict.fromkeys(("timesteps", "sigmas"), parse_numbers)
    | dict.fromkeys(("warp", "cfg_zero", "apg"), _flag)
    | {"guide_scale": _guide_scale}
    | dict.fromkeys(("image", "last_image"), _image)
    | dict.fromkeys(("video", "mask"), _file)
    | {"references": _images}
)

# Metadata of options: those that name files, and flags that are not simply the option's name.
_FILE = {"file": True}
_SIZE = {"flag": "--size"}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run as the user gave them; None takes the default.

    Types are checked here for the command line, prompts files and Python alike. A whole number may
    be a float, and any number one of numpy.

    Attributes:
        prompt: what the video shows.
        negative_prompt: what guidance pushes away from.
        width: pixels; where an image or a control video sets the shape, width and height only
            say how large its area may be.
        height: pixels, likewise.
        frames: a multiple of 4, plus 1; of a control video, as many at most.
        fps: frames per second of the file; the model itself has no notion of time.
        steps: denoising steps.
        preset: solver, steps, shift and guidance that a distilled model was made for, such as
            ``lightx2v-4step``; ``none`` leaves out the bundle's own.
        guide_scale: weight of the prompt; 0 ignores it, 1 does without the negative prompt. Or
            intervals of the run, such as ``5@0-40%``, outside of which it is 1.
        cfg_zero: CFG-Zero*: scale the unconditional prediction, and begin with steps of zero.
        apg: leave out of the guidance what is parallel to the prompt's prediction.
        guidance_rescale: share of the guided prediction that is brought to the standard deviation
            of the prompt's, 0 to 1.
        shift: how far the noise schedule leans to high noise.
        solver: ``unipc``, ``dpm++``, ``euler``, ``lcm``, ``rcm`` or ``rcm-ode``.
        timesteps: what the model is fed at each step, from at most 1000 down, instead of the
            solver's own.
        warp: apply the shift to ``timesteps``.
        sigmas: noise levels of the steps, from at most 1 down, instead of ``timesteps``.
        cache: ``off``, ``easy`` or ``easy:0.05``, or a speedup such as ``2x``: predict velocities
            of some steps from those before.
        speedup: the same as ``cache`` with an ``x``.
        seed: of the initial noise; -1 draws one.
        image: file or pixels ``[H, W, 3]`` of the first frame (i2v, flf2v).
        last_image: likewise of the last frame (flf2v).
        video: file that controls the video (vace).
        mask: video that is white where ``video`` is to be drawn anew (vace).
        references: images of what the video shows (vace).
        vace_scale: weight of the control; 1 if left out (vace).

    Raises:
        UsageError: a value is of another type.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = field(default=None, metadata=_SIZE)
    height: int | None = field(default=None, metadata=_SIZE)
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    preset: str | None = None
    guide_scale: float | str | None = None
    cfg_zero: bool | None = None
    apg: bool | None = None
    guidance_rescale: float | None = None
    shift: float | None = None
    solver: str | None = None
    timesteps: tuple[float, ...] = ()
    warp: bool | None = None
    sigmas: tuple[float, ...] = ()
    cache: str | None = None
    speedup: float | None = None
    seed: int = -1
    image: ImageInput | None = field(default=None, metadata=_FILE)
    last_image: ImageInput | None = field(default=None, metadata=_FILE)
    video: str | os.PathLike[str] | None = field(default=None, metadata=_FILE)
    mask: str | os.PathLike[str] | None = field(default=None, metadata=_FILE)
    references: tuple[ImageInput, ...] = field(default=(), metadata=_FILE | {"flag": "--reference"})
    vace_scale: float | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            checked = option.default if value is None else _CHECKS[option.name](option.name, value)
            object.__setattr__(self, option.name, checked)


# The options that name files.
FILE_OPTIONS = frozenset(
    option.name for option in fields(RunOptions) if option.metadata.get("file")
)
# The name of each option on the command line.
FLAGS = {
    option.name: option.metadata.get("flag", "--" + option.name.replace("_", "-"))
    for option in fields(RunOptions)
}


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with every option decided and checked; see :class:`RunOptions`.

    Files are named here, and None where there are none; their pixels are in
    :class:`wanx.runtime.inputs.reading.Inputs`. ``sigmas`` and ``timesteps`` are None where they
    are the solver's own; ``cfg_zero`` counts the steps of zero.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guide_scale: float | str
    shift: float
    solver: str
    seed: int
    preset: str | None = None
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    cfg_zero: int | None = None
    apg: bool | None = None
    guidance_rescale: float | None = None
    cache: str | None = None
    image: str | None = None
    last_image: str | None = None
    video: str | None = None
    mask: str | None = None
    references: tuple[str, ...] | None = None
    vace_scale: float | None = None

    def sampler(self, draw: Draw | None = None) -> Sampler:
        """Build the sampler of the run.

        Args:
            draw: gives standard normal noise of a shape, for solvers that draw.

        Raises:
            UsageError: there is no sampler for these options.
        """
        sigmas = None if self.sigmas is None else np.append(self.sigmas, 0.0)
        return make_sampler(
            self.solver, self.steps, self.shift, sigmas, timesteps=self.timesteps, draw=draw
        )

    @property
    def forwards(self) -> int:
        """Forwards of the denoiser without a step cache: one for each branch of a step."""
        guidance = self.guidance
        return sum(len(guidance.branches_at(step)) for step in range(self.steps))

    @property
    def guidance(self) -> Guidance:
        """Guidance of each step."""
        return Guidance(
            scales=scales_of(self.guide_scale, self.steps),
            zero_steps=self.cfg_zero or 0,
            zero_star=self.cfg_zero is not None,
            projected=bool(self.apg),
            rescale=self.guidance_rescale or 0.0,
        )
