"""Catalog of everything that is measured, the most valuable first, with the time it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.programs import MAX_SECONDS, TINY, names, programs
from benchmarks.gpu.report import ReportItem
from benchmarks.gpu.sizes import Model, Size
from wanx.errors import UsageError

CEILINGS, PROGRAMS = "ceilings", "programs"
FAMILIES = (
    *("adaln", "residual_adaln", "gated_residual", "rms_norm", "rms_norm_rope"),
    *("quantize", "gelu_quantize"),
)
# What each op of the tuning table gains most from, first.
TUNED = (
    *("attention_providers_8bit", "attention_providers_16bit", "quant_linear"),
    *("quant_linear_gelu_quantize", "quant_linear_residual", "attention_8bit", "attention"),
    *("adaln", "residual_adaln", "rms_norm_rope", "gelu_quantize", "quantize", "gated_residual"),
)
Run = Callable[[BenchContext], Iterator[ReportItem]]


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something to measure.

    Attributes:
        name: in reports and for ``--only``.
        seconds: that have to be left to begin it.
        run: measures.
        needs: names of programs that it would rather have compiled.
        subject_seconds: for the first run of one subject; what takes longer hangs.
        max_seconds: after which it hangs; unless given, three times ``seconds`` and a minute.
    """

    name: str
    seconds: float
    run: Run
    needs: tuple[str, ...] = ()
    subject_seconds: float = 60.0
    max_seconds: float | None = None

    @property
    def limit(self) -> float:
        """Seconds after which it is killed."""
        return self.max_seconds or 3 * self.seconds + 60


def all_items(models: Sequence[Model], sizes: Sequence[Size], *, quick: bool = False) -> list[Item]:
    """All items in their order; ``quick`` leaves out what is there to be thorough."""
    first, *rest = models
    shortest, *longer = sizes
    items = [_numerics(models[-1])]
    # Whatever is timed comes after the compilation, which takes all cores.
    items.append(
        Item(
            name=PROGRAMS, seconds=1, run=lambda bench: iter(()), subject_seconds=MAX_SECONDS,
            max_seconds=MAX_SECONDS + 60,
        )
    )  # fmt: skip
    items.append(Item(name="generation", seconds=25, run=_generation, needs=(TINY,)))
    items.append(Item(name=CEILINGS, seconds=10, run=_ceilings))
    items += [_attention(first, size) for size in sizes]
    items.append(_linears(first))
    items += [_step(first, size) for size in sizes]
    items += [_step(model, shortest) for model in rest]
    items += [_tuning(op) for op in TUNED[:5]]
    items += _kernels(first)
    if quick:
        return items
    items += [_tests("kernels"), _tests("gpu")]
    items += [_tuning(op) for op in TUNED[5:]]
    items += [_attention(model, size) for model in rest for size in sizes]
    items += [_step(model, size) for model in rest for size in longer]
    items += [_depth(first, shortest)]
    items += [item for model in rest for item in (_linears(model), *_kernels(model))]
    items += [_depth(first, size) for size in longer]
    name = f"autotuned-{first.name}-{shortest.name}"
    run = _autotuned(first, shortest)
    items.append(Item(name=name, seconds=150, run=run, subject_seconds=240))
    items.append(Item(name="tensorrt-rtx", seconds=20, run=_tensorrt_rtx))
    items.append(Item(name="onnxruntime-cuda", seconds=40, run=_onnxruntime_cuda))
    return items


def selected(items: Sequence[Item], only: Sequence[str]) -> list[Item]:
    """Those whose names begin with one of ``only``, or all; and what they build on.

    Raises:
        UsageError: nothing is called so.
    """
    for start in only:
        if not any(item.name.startswith(start) for item in items):
            known = ", ".join(item.name for item in items)
            raise UsageError(f"there is nothing called {start} to measure; there are {known}")
    chosen = [item for item in items if not only or item.name.startswith(tuple(only))]
    needs = needed_programs(chosen)
    compared = any(item.name.startswith(_AGAINST_CEILINGS) for item in chosen)
    prepared = []
    for item in items:
        if item.name == PROGRAMS and needs:
            prepared.append(replace(item, run=_programs(needs)))
        elif (item.name == CEILINGS and compared) or (item in chosen and item.name != PROGRAMS):
            prepared.append(item)
    return prepared


# Items whose rates are shown as shares of the ceilings.
_AGAINST_CEILINGS = ("attention", "linears", "step", "kernels")


def needed_programs(items: Sequence[Item]) -> list[str]:
    """The programs that items would rather have compiled, each once."""
    return list(dict.fromkeys(name for item in items for name in item.needs))


# What follows imports what it runs when it runs: a package that is missing stops that item alone.


def _numerics(model: Model) -> Item:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.numerics import numerics

        yield from numerics(bench, model)

    return Item(name="numerics", seconds=40, run=run)


def _ceilings(bench: BenchContext) -> Iterator[ReportItem]:
    from benchmarks.gpu.ceilings import ceilings

    yield from ceilings(bench)


def _programs(needs: Sequence[str]) -> Run:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        compiled = [m for m in bench.models if any(n.startswith(f"{m.name}-") for n in needs)]

        def meanwhile() -> None:
            from benchmarks.gpu.dit_step import compile_ahead

            for model in compiled if bench.compiles else ():
                compile_ahead(bench, model)

        yield from programs(bench, needs, meanwhile)

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
    def measure(family: str) -> Run:
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


def _autotuned(model: Model, size: Size) -> Run:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.dit_depth import autotuned

        yield from autotuned(bench, model, size)

    return run


def _generation(bench: BenchContext) -> Iterator[ReportItem]:
    from benchmarks.gpu.generation import generation

    yield from generation(bench, bench.folder / TINY)


def _tuning(op: str) -> Item:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.tuning import tuning

        yield from tuning(bench, op)

    return Item(name=f"tuning-{op}", seconds=30, run=run, subject_seconds=120)


def _tests(suite: str) -> Item:
    def run(bench: BenchContext) -> Iterator[ReportItem]:
        from benchmarks.gpu.pytest_suites import run_suite

        yield from run_suite(bench, suite)

    return Item(name=f"tests-{suite}", seconds=60, run=run)


def _tensorrt_rtx(bench: BenchContext) -> Iterator[ReportItem]:
    from benchmarks.gpu.tensorrt_rtx import tensorrt_rtx

    yield from tensorrt_rtx(bench)


def _onnxruntime_cuda(bench: BenchContext) -> Iterator[ReportItem]:
    from benchmarks.gpu.onnxruntime_cuda import onnxruntime_cuda

    yield from onnxruntime_cuda(bench)
