"""Statistics of activations, from which static scales of 8-bit layers are chosen.

A point keeps the largest |x| of every channel and a histogram of |x| in logarithmic bins. Both are
integers or maxima, so neither the order of the inputs nor an interruption changes a bit of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from wanx.errors import CorruptInputError, UsageError, WanxError

_MANTISSA_BITS = 5
_SHIFT = 23 - _MANTISSA_BITS
_INFINITY = 0x7F80_0000
BINS = _INFINITY >> _SHIFT
_PATTERNS = 1 << 31 - _SHIFT  # the bins, infinity and NaN
OUTLIER_FACTOR = 6.0
# Elements worked on at a time: on CPUs they stay in the cache, elsewhere memory is bounded.
_CPU_BLOCK = 1 << 17
_DEVICE_BLOCK = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Outlier statistics of an input.

    Attributes:
        ratio: amax over the 99.9 percentile of ``|x|``; 1 where the input was always 0.
        channels: number of channels whose amax is above ``OUTLIER_FACTOR`` times the median of all.
        worst: index of the channel with the largest amax.
    """

    ratio: float
    channels: int
    worst: int


class Observer:
    """Statistics of the input ``[..., K]`` of one linear.

    Bins are the exponent and 5 bits of mantissa of ``|x|`` in fp32: 32 to the octave, each 1.6 % to
    3.1 % wide. Below 2^-126, where floats are evenly spaced, a bin is 2^-131 wide.

    Attributes:
        name: of the point, such as ``blocks.3.ffn.2``.
        channel_amax: float32 [K], on the device of the inputs; [0] before the first one.
        histogram: int64 [BINS], likewise.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.channel_amax = torch.zeros(0)
        self.histogram = torch.zeros(BINS, dtype=torch.int64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count one input.

        Args:
            x: [..., K], floating point on any device.

        Raises:
            WanxError: ``x`` holds NaN or infinity, or has another K than before; nothing of it is
                counted.
        """
        if x.dtype not in (torch.float32, torch.bfloat16):
            x = x.float()  # fp16 has fewer bits of exponent, so its pattern is no prefix of fp32's
        rows = x.reshape(-1, x.shape[-1])
        if rows.numel() == 0:
            return
        # Patterns without the sign are ordered as the numbers, with infinity and NaN on top.
        patterns = rows.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
        lost = 0 if x.dtype == torch.float32 else 16
        sign_free = 0x7FFF_FFFF >> lost
        block = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
        largest = torch.zeros(x.shape[-1], dtype=patterns.dtype, device=x.device)
        counts = torch.zeros(_PATTERNS, dtype=torch.int64, device=x.device)
        for part in torch.split(patterns, max(1, block // x.shape[-1])):
            bits = part & sign_free
            largest = torch.maximum(largest, bits.amax(0))
            bits >>= _SHIFT - lost
            counts += torch.bincount(bits.flatten(), minlength=_PATTERNS)
        if counts[BINS:].any():
            what = "NaN" if bool(rows.isnan().any()) else "infinity"
            raise WanxError(
                f"{what} in the input of {self.name} while calibrating; check the checkpoint, or "
                f"calibrate in fp32"
            )
        amax = (largest.to(torch.int32) << lost).view(torch.float32)
        self._add(amax, counts[:BINS])

    def _add(self, channel_amax: Tensor, histogram: Tensor) -> None:
        if self.channel_amax.numel() == 0:
            self.channel_amax = torch.zeros_like(channel_amax)
            self.histogram = self.histogram.to(channel_amax.device)
        if channel_amax.shape != self.channel_amax.shape:
            raise WanxError(
                f"the input of {self.name} has {channel_amax.numel()} channels and had "
                f"{self.channel_amax.numel()} before; calibrate this model from the start"
            )
        # Not in place: tensors made in inference mode could not be changed outside of it.
        device = self.channel_amax.device
        self.channel_amax = torch.maximum(self.channel_amax, channel_amax.to(device))
        self.histogram = self.histogram + histogram.to(device)

    def merge(self, other: Observer) -> None:
        """Add what ``other`` saw, as if its inputs had come here too.

        Raises:
            WanxError: its inputs had another number of channels.
        """
        if other.channel_amax.numel():
            self._add(other.channel_amax, other.histogram)

    @property
    def count(self) -> int:
        """Number of values seen."""
        return int(self.histogram.sum())

    @property
    def amax(self) -> float:
        """Largest ``|x|``, exactly; 0 before the first input."""
        return float(self.channel_amax.amax()) if self.channel_amax.numel() else 0.0

    def percentile(self, q: float) -> float:
        """Magnitude that ``q`` percent of the values do not exceed.

        Args:
            q: above 0 and up to 100.

        Returns:
            The upper edge of the bin that holds the value of rank ⌈q/100 · count⌉, but never more
            than ``amax``, and ``amax`` itself for 100.

        Raises:
            UsageError: ``q`` is out of range.
        """
        if not 0 < q <= 100:
            raise UsageError(f"percentile is {q}; choose above 0 and up to 100, such as 99.9")
        if q == 100 or not self.channel_amax.numel():
            return self.amax
        ranks = self.histogram.cpu().cumsum(0)
        rank = max(1, math.ceil(q * int(ranks[-1]) / 100))
        index = int(torch.searchsorted(ranks, rank))
        edge = torch.tensor((index + 1) << _SHIFT, dtype=torch.int32).view(torch.float32)
        return min(float(edge), self.amax)

    def outliers(self) -> Outliers:
        """Summarise how far a few values or channels stand out; see :class:`Outliers`.

        Raises:
            WanxError: no input was seen.
        """
        _require_input(self)
        amax = self.channel_amax.cpu()
        limit = OUTLIER_FACTOR * amax.quantile(0.5)
        return Outliers(
            ratio=self.amax / self.percentile(99.9) if self.amax else 1.0,
            channels=int((amax > limit).sum()),
            worst=int(amax.argmax()),
        )


class Observers:
    """The points of a model, by name; see :class:`Observer`."""

    def __init__(self) -> None:
        self.points: dict[str, Observer] = {}

    def __getitem__(self, name: str) -> Observer:
        """The point ``name``, new where nothing was seen at it."""
        if name not in self.points:
            self.points[name] = Observer(name)
        return self.points[name]

    def observe(self, name: str, x: Tensor) -> None:
        """Count one input ``[..., K]`` of the point ``name``; errors as :meth:`Observer.update`."""
        self[name].update(x)

    def merge(self, other: Observers) -> None:
        """Add what ``other`` saw, point by point; errors as :meth:`Observer.merge`."""
        for name, point in other.points.items():
            self[name].merge(point)

    def state(self) -> dict[str, Tensor]:
        """Statistics as tensors for a safetensors file, on the CPU.

        Returns:
            For each point ``<name>.channel_amax`` float32 [K], and of the bins that are not empty
            ``<name>.bins`` int32 [n], ascending, and ``<name>.counts`` int64 [n].
        """
        tensors = {}
        for name, point in sorted(self.points.items()):
            histogram = point.histogram.cpu()
            bins = histogram.nonzero().flatten()
            tensors[f"{name}.channel_amax"] = point.channel_amax.cpu().clone()
            tensors[f"{name}.bins"] = bins.to(torch.int32)
            tensors[f"{name}.counts"] = histogram[bins]
        return tensors

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Go on from :meth:`state`, as if there had been no interruption.

        Raises:
            CorruptInputError: tensors are missing, too many, or not what ``state`` writes.
        """
        observers = cls()
        names = {key.rpartition(".")[0] for key in state}
        expected = {f"{n}.{part}" for n in names for part in ("channel_amax", "bins", "counts")}
        for key in sorted(expected ^ set(state)):
            raise _corrupt(f"{key} is {'missing' if key in expected else 'unknown'}")
        for name in sorted(names):
            amax, bins, counts = (state[f"{name}.{p}"] for p in ("channel_amax", "bins", "counts"))
            _check_point(name, amax, bins, counts)
            point = observers[name]
            point.channel_amax = amax.clone()
            point.histogram = point.histogram.index_copy(0, bins.long(), counts)
        return observers


def input_scale(observer: Observer, limit: float, percentile: float = 100) -> float:
    """Static scale that maps the inputs of a linear to 8 bits: ``percentile / limit``.

    Args:
        observer: what was seen at its input.
        limit: largest magnitude of the number format.
        percentile: of ``|x|``; what lies above it saturates.

    Returns:
        A normal fp32 number.

    Raises:
        UsageError: ``percentile`` is out of range.
        WanxError: nothing was seen, or only values to which no scale applies.
    """
    _require_input(observer)
    largest = observer.percentile(percentile)
    hint = f"leave it out with --skip-layers {observer.name}"
    if not math.isfinite(observer.amax):
        raise WanxError(f"the input of {observer.name} reached {observer.amax}; {hint}")
    if observer.amax == 0:
        raise WanxError(f"the input of {observer.name} was always 0 while calibrating; {hint}")
    scale = torch.tensor(largest / limit, dtype=torch.float32).item()
    if scale < torch.finfo(torch.float32).tiny:
        raise WanxError(
            f"the input of {observer.name} was at most {largest:.3g} in {percentile:g} % of its "
            f"values, so its scale underflows; {hint}"
        )
    return scale


def _require_input(observer: Observer) -> None:
    if not observer.channel_amax.numel():
        raise WanxError(
            f"nothing was seen at the input of {observer.name} while calibrating; leave it out "
            f"with --skip-layers {observer.name}"
        )


def _check_point(name: str, amax: Tensor, bins: Tensor, counts: Tensor) -> None:
    types = [(amax.dtype, amax.ndim), (bins.dtype, bins.ndim), (counts.dtype, counts.ndim)]
    if types != [(torch.float32, 1), (torch.int32, 1), (torch.int64, 1)]:
        raise _corrupt(f"{name} has other types or shapes")
    if len(bins) != len(counts) or bool((counts < 1).any()):
        raise _corrupt(f"{name} has counts that are not of its bins")
    if bool((bins.diff() < 1).any()) or bool(((bins < 0) | (bins >= BINS)).any()):
        raise _corrupt(f"{name} has bins that do not ascend from 0 to {BINS - 1}")
    patterns = amax.view(torch.int32)
    highest = int(patterns.max()) if len(amax) else -(1 << _SHIFT)
    last = int(bins[-1]) if len(bins) else -1
    if bool((patterns < 0).any()) or highest >> _SHIFT != last:
        raise _corrupt(f"{name} has a largest value outside its last bin")


def _corrupt(what: str) -> CorruptInputError:
    return CorruptInputError(f"the saved calibration is damaged: {what}; calibrate again")
