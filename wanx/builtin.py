"""The tiny model that comes with the package, so that a first run needs nothing else."""

from __future__ import annotations

from pathlib import Path


def builtin_bundle() -> Path:
    """Folder of the built-in bundle: a trained Wan2.1 of 64×64 pixels and 17 frames."""
    return Path(__file__).parent / "tiny"
