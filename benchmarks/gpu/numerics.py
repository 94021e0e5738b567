"""Every kernel against its reference, on small tensors: what is wrong shows before it is timed."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils._pytree import tree_leaves

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.distances import differences
from benchmarks.gpu.kernel_cases import families
from benchmarks.gpu.product_cases import attentions, others, products
from benchmarks.gpu.report import Goal, Measurement, ReportItem
from benchmarks.gpu.sizes import Model

TOKENS = 333  # no multiple of any block


def numerics(bench: BenchContext, model: Model, tokens: int = TOKENS) -> Iterator[ReportItem]:
    """Compare all ops and all implementations of attention and products."""
    config = model.config
    cases = [case for family in families(bench, config, tokens).values() for case in family]
    cases += products(bench, config, tokens)
    cases += attentions(bench, config, tokens)
    cases += others(bench, config, tokens)
    wrong = 0
    for case in cases:
        arguments = case.arguments()
        references = case.references(arguments)
        run = bench.first_run(
            case.name,
            lambda case=case, arguments=arguments: case.ours(*arguments),  # type: ignore[misc]
            lambda result, references=references: differences(  # type: ignore[misc]
                tree_leaves(result), references
            ),
        )
        # NaN is beyond any tolerance.
        within = run.error is None and run.numerics["relative_rms"] <= case.tolerance
        wrong += not within
        yield Measurement(
            operation=case.name,
            implementation="wanx",
            shape={"D": config.dim, "L": tokens},
            numerics=run.numerics,
            details={"tolerance": case.tolerance, "within": within},
            error=run.error,
        )
        bench.release()
    yield Goal.at_most(
        f"kernels of {len(cases)} that fail or differ from their reference", wrong, 0
    )
