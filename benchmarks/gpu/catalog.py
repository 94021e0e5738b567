"""Everything that can be measured, the most valuable first, and how long it takes at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.programs import TINY, job, names, programs
from benchmarks.gpu.report import ReportItem
from benchmarks.gpu.sizes import Model, Size
from wanx.errors import UsageError

CEILINGS, PROGRAMS = "ceilings", "programs"


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something to measure.

    Attributes:
        name: in reports and for ``--only``.
        seconds: that have to be left to begin it.
        run: measures.
        needs: names of programs that it would rather have compiled.
    """

    name: str
    seconds: float
    run: Callable[[BenchContext], Iterator[ReportItem]]
    needs: tuple[str, ...] = ()


def every(models: Sequence[Model], sizes: Sequence[Size], *, quick: bool = False) -> list[Item]:
    """All items in their order; ``quick`` leaves out what is there to be thorough."""
    first, *rest = models
    shortest, *longer = sizes
    found = [Item(name=CEILINGS, seconds=10, run=_ceilings)]
    found += [_attention(first, size) for size in sizes]
    found.append(Item(name=PROGRAMS, seconds=100, run=lambda bench: iter(())))
    found += [_step(first, size) for size in sizes]
    found += [_step(model, shortest) for model in rest]
    found += [_linears(first), *_kernels(first)]
    found.append(Item(name="generation", seconds=25, run=_generation, needs=(TINY,)))
    if quick:
        return found
    found += [_attention(model, size) for model in rest for size in sizes]
    found += [_step(model, size) for model in rest for size in longer]
    found += [_depth(first, shortest)]
    found += [item for model in rest for item in (_linears(model), *_kernels(model))]
    found += [_depth(first, size) for size in longer]
    found.append(
        Item(
            name=f"autotuned-{first.name}-{shortest.name}", seconds=150, run=_tuned(first, shortest)
        )
    )
    return found


def selected(items: Sequence[Item], only: Sequence[str]) -> list[Item]:
    """Those whose names begin with one of ``only``, or all; and what they build on.

    Raises:
        UsageError: nothing is called so.
    """
    for start in only:
        if not any(item.name.startswith(start) for item in items):
            known = ", ".join(item.name for item in items)
            raise UsageError(f"there is nothing called {start} to measure; there are {known}")
    wanted = [item for item in items if not only or item.name.startswith(tuple(only))]
    needs = list(dict.fromkeys(name for item in wanted for name in item.needs))
    prepared = []
    for item in items:
        if item.name == PROGRAMS and needs:
            prepared.append(replace(item, run=_programs(needs)))
        elif item.name == CEILINGS or (item in wanted and item.name != PROGRAMS):
            prepared.append(item)
    return prepared


# What follows imports what it runs when it runs: a package that is missing stops that item alone.


def _ceilings(bench: BenchContext) -> Iterator[ReportItem]:
    from benchmarks.gpu.ceilings import ceilings

    yield from ceilings(bench)


def _programs(needs: Sequence[str]) -> Callable[[BenchContext], Iterator[ReportItem]]:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        missing = [name for name in needs if not (bench.folder / name).exists()]
        jobs = [job(name, bench.folder) for name in missing]
        compiled = [m for m in bench.models if any(n.startswith(f"{m.name}-") for n in needs)]

        def meanwhile() -> None:
            from benchmarks.gpu.dit_step import compile_ahead

            for model in compiled:
                compile_ahead(bench, model)

        yield from programs(bench, jobs, meanwhile)

    return run


def _attention(model: Model, size: Size) -> Item:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.attention import attention

        yield from attention(bench, model, size)

    return Item(name=f"attention-{model.name}-{size.name}", seconds=20, run=run)


def _linears(model: Model) -> Item:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.linears import linears

        yield from linears(bench, model)

    return Item(name=f"linears-{model.name}", seconds=40, run=run)


def _kernels(model: Model) -> list[Item]:
    def measure(family: str) -> Callable[[BenchContext], Iterator[ReportItem]]:
        def run(bench: BenchContext) -> Iterator[ReportItem]:
            from benchmarks.gpu.kernels import kernels

            yield from kernels(bench, model, family)

        return run

    return [
        Item(name=f"kernels-{model.name}-{family}", seconds=25, run=measure(family))
        for family in FAMILIES
    ]


def _step(model: Model, size: Size) -> Item:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.dit_step import dit_step

        yield from dit_step(bench, model, size)

    needs = tuple(names([model.name]))
    return Item(name=f"step-{model.name}-{size.name}", seconds=60, run=run, needs=needs)


def _depth(model: Model, size: Size) -> Item:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.dit_depth import whole_depth

        yield from whole_depth(bench, model, size)

    seconds = 40 if size.tokens < 40_000 else 110
    needs = tuple(names([model.name]))
    return Item(name=f"depth-{model.name}-{size.name}", seconds=seconds, run=run, needs=needs)


def _tuned(model: Model, size: Size) -> Callable[[BenchContext], Iterator[ReportItem]]:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.dit_depth import tuned

        yield from tuned(bench, model, size)

    return run


def _generation(bench: BenchContext) -> Iterator[ReportItem]:
    from benchmarks.gpu.generation import generation

    yield from generation(bench, bench.folder / TINY)


FAMILIES = (
    *("adaln", "residual_adaln", "gated_residual", "rms_norm", "rms_norm_rope"),
    *("quantize", "gelu_quantize"),
)
