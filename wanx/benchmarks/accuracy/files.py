"""Files of a comparison."""

from __future__ import annotations

from pathlib import Path

from wanx.benchmarks.accuracy.comparison import Comparison
from wanx.benchmarks.accuracy.page import render
from wanx.benchmarks.report.files import dumps, prepare_folder, write_files


def write_accuracy(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write ``accuracy.json`` and ``accuracy.html``, replacing those of an earlier comparison.

    Raises:
        EnvironmentMismatchError: the packages of ``wanx[report]`` are missing.
        UsageError: the folder cannot be had.
        WanxError: the disk is full.
    """
    prepare_folder(folder)
    data, page = folder / "accuracy.json", folder / "accuracy.html"
    write_files({data: dumps(comparison.to_json()), page: render(comparison)})
    return data, page
