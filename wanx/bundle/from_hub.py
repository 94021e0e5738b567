"""Bundles on the Hugging Face hub: repositories whose files are those of a bundle's folder."""

from __future__ import annotations

from pathlib import Path

from wanx.bundle.manifest import MANIFEST
from wanx.bundle.recovery import is_wanx_bundle, manifest_of
from wanx.errors import UsageError
from wanx.hub.download import download
from wanx.hub.reference import HubReference
from wanx.hub.repository import Repository, open_repository
from wanx.progress import Progress, no_progress

_MAX_MANIFEST_BYTES = 8 << 20


def fetch_bundle(
    reference: HubReference, progress: Progress = no_progress, *, manifest_only: bool = False
) -> Path:
    """Download a bundle into the hub's cache, unless it is there.

    Args:
        reference: of the repository.
        progress: told how many bytes have arrived.
        manifest_only: leave its other files where they are.

    Returns:
        Its folder in the cache. Opening it checks its files, of which some may be missing.

    Raises:
        UsageError: there is no such repository, or it is no bundle.
        WanxError: as :func:`wanx.hub.download.download`.
    """
    if reference.file:
        raise UsageError(
            f"{reference} is a file of a repository, not a bundle; give hf://owner/name"
        )
    repository = open_repository(reference)
    names = bundle_files(repository)
    if not names:
        raise UsageError(
            f"{reference} is no bundle, it has no {MANIFEST} of wanx; `wanx export {reference}` "
            "makes one of a checkpoint"
        )
    return download(repository, names[:1] if manifest_only else names, progress)


def bundle_files(repository: Repository) -> list[str]:
    """Files of a bundle that its repository has, by its manifest, which is downloaded first.

    Returns:
        The manifest and what it lists; nothing where there is none, or another program's.

    Raises:
        CorruptInputError: the manifest is damaged.
        WanxError: as :func:`wanx.hub.download.download`.
    """
    if not 0 < repository.sizes.get(MANIFEST, 0) <= _MAX_MANIFEST_BYTES:
        return []
    folder = download(repository, [MANIFEST])
    if not is_wanx_bundle(folder):
        return []
    listed = manifest_of(folder).files
    return [MANIFEST, *(name for name in listed if name in repository.sizes)]
