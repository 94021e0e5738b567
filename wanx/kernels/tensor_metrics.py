"""Distances between tensors, summed in float64 chunk by chunk: large ones stay on their device.

The same figures of NumPy arrays are in :mod:`wanx.accuracy.metrics`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

MAX_DB = 200.0  # of an exact answer, which has no noise
_CHUNK = 1 << 24
_TINY = 1e-300


@dataclass
class Difference:
    """Distance of candidates from their references, over all pairs that were added.

    Attributes:
        dot: Σ c·r.
        power: Σ c².
        signal: Σ r².
        noise: Σ (c - r)².
        largest: max |r|.
        error: max |c - r|.
    """

    dot: float = 0.0
    power: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    error: float = 0.0

    @classmethod
    def of(cls, candidate: Tensor, reference: Tensor) -> Difference:
        """The distance of one tensor from its reference, of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        difference = cls()
        difference.add(candidate, reference)
        return difference

    def add(self, candidate: Tensor, reference: Tensor) -> None:
        """Take one more pair into account.

        Raises:
            ValueError: the shapes differ.
        """
        if candidate.shape != reference.shape:
            shapes = f"{list(candidate.shape)} and {list(reference.shape)}"
            raise ValueError(f"shapes differ: {shapes}")
        pairs = zip(
            candidate.detach().reshape(-1).split(_CHUNK),
            reference.detach().reshape(-1).split(_CHUNK),
            strict=True,
        )
        for c, r in ((c.double(), r.double()) for c, r in pairs if c.numel()):
            difference = c - r
            self.dot += float(c @ r)
            self.power += float(c @ c)
            self.signal += float(r @ r)
            self.noise += float(difference @ difference)
            self.largest = max(self.largest, float(r.abs().max()))
            self.error = max(self.error, float(difference.abs().max()))

    @property
    def finite(self) -> bool:
        """True if neither side holds NaN or infinity."""
        return math.isfinite(self.power + self.signal)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both; nan where one is not finite."""
        if not self.finite:
            return math.nan
        return self.dot / math.sqrt(max(self.power * self.signal, _TINY))

    @property
    def relative_rms(self) -> float:
        """‖c - r‖ / ‖r‖; nan where one is not finite."""
        return math.sqrt(self.noise / max(self.signal, _TINY)) if self.finite else math.nan

    @property
    def max_error(self) -> float:
        """The largest error over the largest magnitude of the reference; nan if not finite."""
        return self.error / max(self.largest, _TINY) if self.finite else math.nan

    @property
    def sqnr_db(self) -> float:
        """``10·log10(Σ r² / Σ (c - r)²)``, within ±``MAX_DB``; -``MAX_DB`` if not finite."""
        if not self.finite:
            return -MAX_DB
        if self.noise == 0:
            return MAX_DB
        if self.signal == 0:
            return -MAX_DB
        ratio = 10 * (math.log10(self.signal) - math.log10(self.noise))
        return min(MAX_DB, max(-MAX_DB, ratio))
