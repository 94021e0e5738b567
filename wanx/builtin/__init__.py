"""The tiny models that come with the package, so that a first run needs nothing else."""

from __future__ import annotations

from pathlib import Path

BUILTIN = ("tiny", "tiny-i2v")


def builtin_bundle(name: str = "tiny") -> Path:
    """Folder of a built-in bundle: a trained Wan2.1 of 64×64 pixels and 17 frames."""
    assert name in BUILTIN
    return Path(__file__).parent / name.replace("-", "_")


def find_bundle(name: str | Path) -> Path:
    """Folder of the bundle that a user calls ``name``: a built-in one, or a path."""
    return builtin_bundle(str(name)) if str(name) in BUILTIN else Path(name)


def is_builtin(folder: Path) -> bool:
    """Whether a bundle lies in the package, whose files an installer may have hard-linked."""
    return folder in [builtin_bundle(name) for name in BUILTIN]
