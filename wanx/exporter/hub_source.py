"""Sources of an export on the Hugging Face hub, and the local files in their place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from wanx.builtin import BUILTIN
from wanx.bundle.from_hub import bundle_files
from wanx.bundle.manifest import MANIFEST
from wanx.bundle.recovery import absolute
from wanx.checkpoints.checkpoint import PartPaths
from wanx.checkpoints.layouts.selection import checkpoint_files
from wanx.checkpoints.lora.fuse import parse_loras
from wanx.checkpoints.sparse_copy import sparse_copy
from wanx.errors import UsageError
from wanx.exporter.options import ExportOptions
from wanx.files.disk import preflight_space, same_disk
from wanx.hub.reference import HubReference, hub_reference
from wanx.hub.remote_file import open_remote
from wanx.hub.repository import Repository, download, open_repository, require_space
from wanx.progress import Progress, no_progress, step_counter


@dataclass(frozen=True, kw_only=True)
class RemoteFiles:
    """Files of one repository that an export reads.

    Attributes:
        repository: that they are in.
        names: of the files.
    """

    repository: Repository
    names: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        """Those that are not in the cache."""
        return self.repository.missing(self.names)

    @property
    def missing_bytes(self) -> int:
        """Bytes of those that are not in the cache."""
        return self.repository.bytes_of(self.missing)


class HubSource:
    """Options of an export whose files are on the hub.

    Attributes:
        files: that they name, by option: ``source``, a part, or a LoRA's number.
    """

    def __init__(self, options: ExportOptions) -> None:
        """List the repositories that the options name.

        Raises:
            WanxError: as :func:`wanx.hub.repository.open_repository`, or what is named is no
                checkpoint, bundle or file.
        """
        self._options = options
        self._loras = parse_loras(options.loras)
        self._repositories: dict[tuple[str, str | None], Repository] = {}
        self._folders: list[tempfile.TemporaryDirectory[str]] = []
        self._reference = None if options.source in BUILTIN else hub_reference(options.source)
        if options.revision is not None:
            self._reference = self._revised(options.revision)
        self.files: dict[str, RemoteFiles] = {}
        if self._reference is not None:
            self.files["source"] = self._source(self._reference)
        for field in fields(PartPaths):
            if isinstance(part := getattr(options.parts, field.name), HubReference):
                self.files[field.name] = self._file(part)
        for number, lora in enumerate(self._loras):
            if isinstance(lora.path, HubReference):
                self.files[str(number)] = self._file(lora.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(f.repository.bytes_of(f.names) for f in self.files.values())

    @property
    def missing_bytes(self) -> int:
        """Bytes that are not in the cache."""
        return sum(files.missing_bytes for files in self.files.values())

    def require_space(self, output: Path, bundle_bytes: int) -> None:
        """Check that the disks have room for what is missing, and for the bundle.

        Args:
            output: folder of the bundle.
            bundle_bytes: that it takes.

        Raises:
            WanxError: they have not.
        """
        preflight_space(absolute(output), bundle_bytes)
        for files in self.files.values():
            cache = files.repository.cache
            beside = bundle_bytes if same_disk(absolute(output), cache) else 0
            require_space(files.repository, files.missing, beside)
            bundle_bytes += files.missing_bytes

    def headers(self, progress: Progress = no_progress) -> ExportOptions:
        """Options with files in their place that lack the tensors, where they are not in the cache.

        LoRAs and bundles are downloaded: what is checked of them takes their numbers.

        Raises:
            WanxError: as :func:`wanx.hub.repository.download`.
        """

        def place(option: str, files: RemoteFiles) -> Path:
            whole = option.isdigit() or MANIFEST in files.names
            if whole or files.repository.offline or not files.missing:
                return download(files.repository, files.names, progress)
            return self._headers_of(files, progress)

        return self._local(place)

    def download(self, progress: Progress = no_progress) -> ExportOptions:
        """Options with files of the hub's cache in their place.

        Raises:
            WanxError: as :func:`wanx.hub.repository.download`.
        """
        return self._local(lambda option, files: download(files.repository, files.names, progress))

    def _local(self, place: Callable[[str, RemoteFiles], Path]) -> ExportOptions:
        folders = {option: place(option, files) for option, files in self.files.items()}
        paths = {option: folder / self.files[option].names[0] for option, folder in folders.items()}
        options = self._options
        if self._reference is not None:
            whole = self._reference.file is None
            options = replace(options, source=(folders if whole else paths)["source"])
        parts = {
            field.name: paths[field.name] for field in fields(PartPaths) if field.name in paths
        }
        loras = tuple(
            replace(lora, path=paths.get(str(number), lora.path))
            for number, lora in enumerate(self._loras)
        )
        return replace(options, parts=replace(options.parts, **parts), loras=loras)

    def _revised(self, revision: str) -> HubReference:
        if self._reference is None or self._reference.revision not in (None, revision):
            raise UsageError(
                f"--revision {revision} is of a source on the hub, and {self._options.source} is "
                + ("not there" if self._reference is None else "another revision already")
            )
        return replace(self._reference, revision=revision)

    def _source(self, reference: HubReference) -> RemoteFiles:
        if reference.file:
            return self._file(reference)
        repository = self._repository(reference)
        if MANIFEST in repository.sizes:
            names: Sequence[str] = bundle_files(repository)
        else:
            given = {f.name for f in fields(PartPaths) if getattr(self._options.parts, f.name)}
            names = checkpoint_files(
                str(reference), list(repository.sizes), without=given,
                full_precision=self._options.precision == "fp32",
            )  # fmt: skip
        return RemoteFiles(repository=repository, names=tuple(names))

    def _file(self, reference: HubReference) -> RemoteFiles:
        repository = self._repository(reference)
        if reference.file is None or reference.file not in repository.sizes:
            found = [name for name in repository.sizes if name.endswith(".safetensors")]
            raise UsageError(
                f"{reference.repository} has no file {reference.file or 'that is named'}; it has "
                f"{', '.join(found[:5]) or 'no .safetensors'}"
            )
        return RemoteFiles(repository=repository, names=(reference.file,))

    def _repository(self, reference: HubReference) -> Repository:
        key = (reference.repository, reference.revision)
        if key not in self._repositories:
            self._repositories[key] = open_repository(reference)
        return self._repositories[key]

    def _headers_of(self, files: RemoteFiles, progress: Progress) -> Path:
        folder = tempfile.TemporaryDirectory(prefix="wanx-headers-")
        self._folders.append(folder)  # which removes it at last
        count = step_counter(progress, "read headers", len(files.names))
        for name in files.names:
            target = Path(folder.name, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in files.missing:
                with open_remote(files.repository, name) as remote:
                    sparse_copy(remote, files.repository.sizes[name], target)
            else:
                target.symlink_to(files.repository.snapshot / name)
            count()
        return Path(folder.name)
