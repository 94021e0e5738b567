"""Golden steps that the source of an export brings along."""

from __future__ import annotations

from dataclasses import asdict

from wanx.bundle.golden_steps import GOLDEN, Golden, read_golden
from wanx.exporter.options import ResolvedExport


def known_golden(resolved: ResolvedExport) -> Golden | None:
    """Golden steps of a bundle that is exported again, if they are those that would be recorded.

    That is so where they are of the same run. They come from what the bundle itself was exported
    from, in fp32.

    Raises:
        CorruptInputError: the bundle's golden steps cannot be read.
    """
    path = resolved.checkpoint.source / GOLDEN
    if resolved.checkpoint.layout != "bundle" or not path.is_file():
        return None
    golden = read_golden(path)
    (run, _), *others = resolved.runs
    facts = {name: str(value) for name, value in asdict(run).items() if value is not None}
    steps = [step.step for step in golden.steps]
    if others or golden.run != facts or steps != list(range(1, run.steps + 1)):
        return None
    return golden
