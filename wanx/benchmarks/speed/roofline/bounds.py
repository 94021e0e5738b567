"""Time of each part of a component against the least that the machine allows.

The ceiling of a part is the least time for its operations at the rate of a large product, or for
its bytes at the rate of a copy, whichever is longer (Williams, Waterman and Patterson, "Roofline",
2009). Its own time is its share of a profiled run, times what a run took when nothing was profiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wanx.benchmarks.speed.roofline.ceilings import Ceilings
from wanx.benchmarks.speed.roofline.cost import PartCost
from wanx.benchmarks.speed.roofline.profile import Operation, Profile


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a component.

    Attributes:
        name: see :mod:`wanx.benchmarks.speed.roofline.parts`.
        flops: operations by type; see :class:`wanx.benchmarks.speed.roofline.cost.PartCost`.
        bytes: that have to move.
        least_seconds: at the machine's ceilings.
        bound: ``compute`` or ``memory``, whichever makes the ceiling.
        seconds: that it took; None where the target has no profile.
    """

    name: str
    flops: Mapping[str, float]
    bytes: float
    least_seconds: float
    bound: str
    seconds: float | None

    @property
    def fraction(self) -> float | None:
        """Of its ceiling; 1 is as fast as the machine can be."""
        return self.least_seconds / self.seconds if self.seconds else None


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A component of a subject in a case.

    Attributes:
        subject: index of the subject.
        case: index of the case.
        component: such as ``dit``.
        unit: what was timed, such as ``denoising step``.
        seconds: of that; the median.
        ceilings: of the machine.
        parts: the most expensive first.
        operations: the most expensive ones, where they were asked for.
    """

    subject: int
    case: int
    component: str
    unit: str
    seconds: float
    ceilings: Ceilings
    parts: tuple[Part, ...]
    operations: tuple[Operation, ...] = ()

    @property
    def least_seconds(self) -> float:
        """At the ceilings, one part after the other."""
        return sum(part.least_seconds for part in self.parts)

    @property
    def largest_gap(self) -> Part | None:
        """The part that loses the most time over its ceiling."""
        timed = [part for part in self.parts if part.seconds is not None]
        return max(timed, key=lambda part: (part.seconds or 0) - part.least_seconds, default=None)

    @property
    def sentence(self) -> str:
        """The finding that matters most, in a sentence."""
        whole = f"{fraction_text(self.least_seconds / self.seconds)} of the ceiling in all"
        gap = self.largest_gap
        if gap is None or gap.seconds is None or gap.fraction is None:
            return f"A {self.unit} runs at {whole}; this target gives no times of parts."
        share = gap.seconds / self.seconds
        return (
            f"The largest gap: {gap.name}, {share:.0%} of the time of a {self.unit}, at "
            f"{fraction_text(gap.fraction)} of the ceiling; {whole}."
        )


def fraction_text(fraction: float | None) -> str:
    """A part of a ceiling with two digits."""
    if fraction is None:
        return "–"
    return f"{fraction:.2f}" if fraction >= 0.005 or fraction == 0 else "less than 0.01"


def roofline(
    costs: Sequence[PartCost],
    ceilings: Ceilings,
    profile: Profile | None,
    *,
    runs: int,
    seconds: float,
    with_operations: bool = False,
    **where: object,
) -> Roofline:
    """Put together what a component costs, what it took and what the machine can do.

    Args:
        costs: of one run of its graph.
        ceilings: of the machine.
        profile: of one run; None where the target has none.
        runs: of the graph in what was timed.
        seconds: that was timed.
        with_operations: whether to keep the most expensive operations.
        where: subject, case, component and unit.
    """
    known = {cost.part: cost for cost in costs}
    shares = {} if profile is None else dict(profile.parts)
    parts = []
    for name in dict.fromkeys([*shares, *known]):
        cost = known.get(name) or PartCost(part=name, flops={}, bytes=0.0)
        flops = {kind: runs * count for kind, count in cost.flops.items()}
        moved = runs * cost.bytes
        compute = ceilings.compute_seconds(flops)
        parts.append(
            Part(
                name=name,
                flops=flops,
                bytes=moved,
                least_seconds=ceilings.seconds(flops, moved),
                bound="compute" if compute >= moved / ceilings.bytes else "memory",
                seconds=shares.get(name, 0.0) * seconds if shares else None,
            )
        )
    return Roofline(
        seconds=seconds,
        ceilings=ceilings,
        parts=tuple(sorted(parts, key=lambda part: -(part.seconds or part.least_seconds))),
        operations=profile.operations if profile is not None and with_operations else (),
        **where,  # type: ignore[arg-type]
    )
