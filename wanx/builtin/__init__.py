"""Built-in tiny models, so that a first run needs nothing else.

``tiny/`` draws from a prompt, ``tiny_i2v/`` goes on from an image. Imports ``bundle`` only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanx.bundle.integrity import Verify
    from wanx.bundle.reader import Bundle

BUILTIN = ("tiny", "tiny-i2v")


def builtin_bundle(name: str = "tiny") -> Path:
    """Folder of a built-in bundle: a trained Wan2.1 of 64×64 pixels and 17 frames."""
    assert name in BUILTIN
    return Path(__file__).parent / name.replace("-", "_")


def find_bundle(name: str | Path) -> Path:
    """Folder of the bundle that a user calls ``name``: a built-in one, or a path."""
    return builtin_bundle(str(name)) if str(name) in BUILTIN else Path(name)


def is_builtin(folder: Path) -> bool:
    """True if a bundle lies in the package, whose files an installer may have hard-linked."""
    return folder in [builtin_bundle(name) for name in BUILTIN]


def open_named(name: str | Path, *, verify: Verify = "auto") -> Bundle:
    """Open a built-in bundle by its name, or any bundle by its folder.

    Args:
        name: ``tiny``, ``tiny-i2v`` or a folder.
        verify: see :func:`wanx.bundle.reader.open_bundle`.

    Raises:
        WanxError: as :func:`wanx.bundle.reader.open_bundle`.
    """
    from wanx.bundle.reader import open_bundle

    folder = find_bundle(name)
    return open_bundle(folder, verify=verify, allow_hard_links=is_builtin(folder))
