"""Measure the built-in model at every precision, and compare with the stored envelopes.

    python tools/accuracy_envelopes.py [--write]

Prints every figure beside its envelope; ``--write`` then stores new envelopes around the figures,
for `pytest -m accuracy` to hold them to. Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanx.bundle.reader import Bundle


def export_afresh(precision: str, output: Path) -> Bundle:
    """Export the built-in model; a calibration that is remembered could be of other code."""
    import wanx
    from wanx.exporter.calibration.options import CalibrationOptions

    return wanx.export(
        "tiny", output, precision=precision, calibration=CalibrationOptions(fresh=True)
    )


def main() -> None:
    """Measure, print the difference, and write if asked to."""
    sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("accuracy", "tiny")]
    from envelopes import STORED, enclose, judge, read_envelopes, table, write_envelopes
    from figures import measure_all

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"replace {STORED.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wanx-accuracy-") as folder:
        measured = measure_all(export_afresh, Path(folder))
    figures = {precision: found.figures for precision, found in measured.items()}
    rows = judge(read_envelopes(STORED), figures)
    print(table(rows))
    outside = [row for row in rows if row.verdict not in ("ok", "reported")]
    print(f"{len(outside)} of {len(rows)} figures are not what is stored, within their margins")
    if arguments.write:
        write_envelopes(enclose(figures), STORED)
        print(f"wrote {STORED}")


if __name__ == "__main__":
    main()
