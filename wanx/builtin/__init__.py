"""Built-in tiny models, so that a first run needs nothing else.

``tiny/`` draws from a prompt, ``tiny_i2v/`` goes on from an image. Imports ``bundle`` and
``hub`` only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wanx.hub.reference import hub_reference
from wanx.progress import Progress, no_progress

if TYPE_CHECKING:
    from wanx.bundle.integrity import Verify
    from wanx.bundle.reader import Bundle

BUILTIN = ("tiny", "tiny-i2v")


def builtin_bundle(name: str = "tiny") -> Path:
    """Folder of a built-in bundle: a trained Wan2.1 of 64×64 pixels and 17 frames."""
    assert name in BUILTIN
    return Path(__file__).parent / name.replace("-", "_")


def find_bundle(
    name: str | Path, progress: Progress = no_progress, *, manifest_only: bool = False
) -> Path:
    """Folder of the bundle that a user calls ``name``: a built-in one, a path, or one on the hub.

    Args:
        name: ``tiny``, a path, or ``owner/name`` as :func:`wanx.hub.reference.hub_reference` takes
            it, whose files are downloaded.
        progress: told how much has arrived.
        manifest_only: leave all of a bundle on the hub there but the manifest.

    Raises:
        WanxError: as :func:`wanx.bundle.from_hub.fetch_bundle`.
    """
    if str(name) in BUILTIN:
        return builtin_bundle(str(name))
    if reference := hub_reference(name):
        from wanx.bundle.from_hub import fetch_bundle

        return fetch_bundle(reference, progress, manifest_only=manifest_only)
    return Path(name)


def is_builtin(folder: Path) -> bool:
    """True if a bundle lies in the package, whose files an installer may have hard-linked."""
    return folder in [builtin_bundle(name) for name in BUILTIN]


def open_named(
    name: str | Path, progress: Progress = no_progress, *, verify: Verify = "auto"
) -> Bundle:
    """Open a built-in bundle by its name, or any bundle by its folder or its name on the hub.

    Args:
        name: as for :func:`find_bundle`.
        progress: likewise.
        verify: see :func:`wanx.bundle.reader.open_bundle`.

    Raises:
        WanxError: as :func:`find_bundle` and :func:`wanx.bundle.reader.open_bundle`.
    """
    from wanx.bundle.reader import open_bundle

    folder = find_bundle(name, progress)
    return open_bundle(folder, verify=verify, allow_hard_links=is_builtin(folder))
