"""Export a trained checkpoint to a bundle that the package carries.

python tools/tiny/package.py CHECKPOINT [--preset tiny-i2v]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from wanx.builtin import BUILTIN, builtin_bundle
from wanx.bundle.reader import open_bundle
from wanx.checkpoints.checkpoint import open_checkpoint
from wanx.config.models import PRESETS
from wanx.exporter.export import plan, write_bundle
from wanx.exporter.options import ExportOptions

PRECISION = {"tiny": "fp32", "tiny-i2v": "bf16"}


def package(checkpoint: Path, preset: str, output: Path) -> None:
    """Write the bundle of ``checkpoint``, which is in the original layout.

    That layout has no room for the latent statistics and the defaults of a run, so the whole
    configuration is the preset's.
    """
    opened = replace(open_checkpoint(checkpoint), config=PRESETS[preset])
    options = ExportOptions(output=output, precision=PRECISION[preset], force=True)
    write_bundle(plan(options, opened))
    print(f"{output}: {open_bundle(output).size_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--preset", choices=BUILTIN, default="tiny")
    arguments = parser.parse_args()
    package(arguments.checkpoint, arguments.preset, builtin_bundle(arguments.preset))
