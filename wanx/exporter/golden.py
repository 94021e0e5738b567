"""Golden steps of an export: those that its source brings along, or recorded ones."""

from __future__ import annotations

import logging
from dataclasses import asdict

from wanx.bundle.golden_steps import GOLDEN, Golden, read_golden
from wanx.bundle.reader import Bundle
from wanx.exporter.options import ResolvedExport
from wanx.exporter.packages import missing_packages, require_packages
from wanx.progress import Progress

_log = logging.getLogger("wanx.exporter")


def source_golden(resolved: ResolvedExport, bundle: Bundle, progress: Progress) -> Golden | None:
    """Golden steps of the source, recorded unless it has them; None where nothing can record.

    Args:
        resolved: the export.
        bundle: of its components, with which runs are prepared.
        progress: told how far the recording is.

    Raises:
        EnvironmentMismatchError: nothing can record, and ``--gate`` runs them.
        WanxError: the source's cannot be read, or the recording fails.
    """
    if golden := known_golden(resolved):
        return golden
    if missing := missing_packages():
        if resolved.options.gate:
            require_packages("record the golden steps that --gate runs")
        _log.warning(
            "no golden steps are recorded, which takes %s: wanx verify will check hashes alone; "
            "pip install 'wanx[export]' for both", ", ".join(missing),
        )  # fmt: skip
        return None
    from wanx.exporter.calibration.calibrate import record_golden

    options = resolved.options.calibration
    return record_golden(resolved.checkpoint, bundle, options, progress, resolved.runs)


def known_golden(resolved: ResolvedExport) -> Golden | None:
    """Golden steps of a bundle that is exported again, if they are those that would be recorded.

    That is so where they are of the same run. They come from what the bundle itself was exported
    from, in fp32.

    Raises:
        CorruptInputError: the bundle's golden steps cannot be read.
    """
    path = resolved.checkpoint.source / GOLDEN
    changed = bool(resolved.checkpoint.loras)
    if changed or resolved.checkpoint.layout != "bundle" or not path.is_file():
        return None
    golden = read_golden(path)
    (run, _), *others = resolved.runs
    facts = {name: str(value) for name, value in asdict(run).items() if value is not None}
    steps = [step.step for step in golden.steps]
    if others or golden.run != facts or steps != list(range(1, run.steps + 1)):
        return None
    return golden
