"""Bundles on the Hugging Face hub: repositories whose files are those of a bundle's folder."""

from __future__ import annotations

from pathlib import Path

from wanx.bundle.manifest import MANIFEST
from wanx.bundle.recovery import manifest_of
from wanx.errors import UsageError
from wanx.hub.reference import HubReference
from wanx.hub.repository import Repository, download, open_repository
from wanx.progress import Progress, no_progress


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
        WanxError: as :func:`wanx.hub.repository.download`.
    """
    repository = open_repository(reference)
    if reference.file or MANIFEST not in repository.sizes:
        raise UsageError(
            f"{reference} is no bundle, it has no {MANIFEST}; `wanx export {reference}` makes one "
            "of a checkpoint"
        )
    names = [MANIFEST] if manifest_only else bundle_files(repository)
    return download(repository, names, progress, check=False)


def bundle_files(repository: Repository) -> list[str]:
    """Files of a bundle that its repository has, by its manifest, which is downloaded.

    Raises:
        CorruptInputError: the manifest is damaged, or another program's.
        WanxError: as :func:`wanx.hub.repository.download`.
    """
    folder = download(repository, [MANIFEST], check=False)
    listed = manifest_of(folder).files
    return [MANIFEST, *(name for name in listed if name in repository.sizes)]
