"""Sources of an export on the Hugging Face hub, and the local files in their place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath

from wanx.builtin import BUILTIN
from wanx.bundle.from_hub import bundle_files
from wanx.bundle.recovery import absolute
from wanx.checkpoints.checkpoint import PartPaths
from wanx.checkpoints.layouts.files import WEIGHT_FILES
from wanx.checkpoints.layouts.selection import checkpoint_files
from wanx.checkpoints.lora.alpha import CONFIG as LORA_CONFIG
from wanx.checkpoints.lora.fuse import parse_loras
from wanx.checkpoints.sparse_copy import sparse_copy
from wanx.errors import UsageError, WanxError, abbreviate
from wanx.exporter.options import ExportOptions
from wanx.files.disk import preflight_space, same_disk
from wanx.hub.download import download, require_space
from wanx.hub.reference import HubReference, hub_reference
from wanx.hub.remote_file import open_remote
from wanx.hub.repository import Repository, open_repository
from wanx.progress import Progress, no_progress, step_counter

_CONFIG = "config.json"  # beside the file of a transformer, tells sizes
_READ = (*WEIGHT_FILES, ".json", ".model")  # of a folder of one part


@dataclass(frozen=True, kw_only=True)
class RemoteFiles:
    """Files of one repository that an option of an export names.

    Attributes:
        repository: that they are in.
        names: of the files.
        path: of the file or folder in it that takes the option's place; empty for all of it.
        whole: their headers are not enough to plan with.
    """

    repository: Repository
    names: tuple[str, ...]
    path: str = ""
    whole: bool = False


class HubSource:
    """Options of an export whose files are on the hub.

    Attributes:
        files: that they name, by option: ``source``, a part, or a LoRA's number.
        nbytes: of all of them.
        missing_bytes: of those that were not in the cache.
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
        self._folders: dict[tempfile.TemporaryDirectory[str], Repository] = {}
        self._reference = None if options.source in BUILTIN else hub_reference(options.source)
        if options.revision is not None:
            self._reference = self._revised(options.revision)
        self.files: dict[str, RemoteFiles] = {}
        if self._reference is not None:
            self.files["source"] = self._source(self._reference)
        for field in fields(PartPaths):
            if isinstance(part := getattr(options.parts, field.name), HubReference):
                self.files[field.name] = self._file(part, _CONFIG)
        for number, lora in enumerate(self._loras):
            if isinstance(lora.path, HubReference):
                self.files[str(number)] = self._lora(lora.path)
        every = self.files.values()
        self.nbytes = sum(f.repository.bytes_of(f.names) for f in every)
        self.missing_bytes = sum(
            f.repository.bytes_of(f.repository.missing(f.names)) for f in every
        )

    def require_space(self, output: Path, bundle_bytes: int) -> None:
        """Check that the disks have room for what is missing, and for the bundle.

        Args:
            output: folder of the bundle.
            bundle_bytes: that it takes.

        Raises:
            WanxError: they have not.
        """
        preflight_space(absolute(output), bundle_bytes)
        beside = 0
        for files in self.files.values():  # all in one cache
            shared = same_disk(absolute(output), files.repository.cache)
            missing = files.repository.missing(files.names)
            require_space(files.repository, missing, beside + (bundle_bytes if shared else 0))
            beside += files.repository.bytes_of(missing)

    def headers(self, progress: Progress = no_progress) -> ExportOptions:
        """Options with files in their place that lack the tensors, where they are not in the cache.

        LoRAs and bundles are downloaded: what is checked of them takes their numbers.

        Raises:
            WanxError: as :func:`wanx.hub.download.download`.
        """

        def place(files: RemoteFiles) -> Path:
            missing = files.repository.missing(files.names)
            if files.whole or files.repository.offline or not missing:
                return download(files.repository, files.names, progress)
            return self._headers_of(files, progress)

        return self._local(place)

    def download(self, progress: Progress = no_progress) -> ExportOptions:
        """Options with files of the hub's cache in their place.

        Raises:
            WanxError: as :func:`wanx.hub.download.download`.
        """
        return self._local(lambda files: download(files.repository, files.names, progress))

    def remove_headers(self) -> None:
        """Remove the files that :meth:`headers` made."""
        while self._folders:
            folder, _ = self._folders.popitem()
            folder.cleanup()

    def named(self, text: str) -> str:
        """A text in which files that :meth:`headers` made are those of the hub."""
        for folder, repository in self._folders.items():
            text = text.replace(folder.name, f"hf://{repository.reference}")
        return text

    @contextmanager
    def names_in_errors(self) -> Iterator[None]:
        """Let errors name files as the hub does, and advise nothing that is for a folder."""
        try:
            yield
        except WanxError as error:
            text = self.named(str(error))
            if text != str(error):
                text = text.replace("download it completely", "use a repository that is complete")
            error.args = (text,)
            raise

    def _local(self, place: Callable[[RemoteFiles], Path]) -> ExportOptions:
        paths = {option: place(files) / files.path for option, files in self.files.items()}
        options = self._options
        if self._reference is not None:
            options = replace(options, source=paths["source"], revision=None)
        names = [field.name for field in fields(PartPaths)]
        parts = {name: paths[name] for name in names if name in paths}
        loras = tuple(
            replace(lora, path=paths.get(str(number), lora.path))
            for number, lora in enumerate(self._loras)
        )
        return replace(options, parts=replace(options.parts, **parts), loras=loras)

    def _revised(self, revision: str) -> HubReference:
        if self._reference is None:
            raise UsageError(
                f"--revision {revision} is of a source on the hub, and "
                f"{self._options.source or 'the built-in model'} is none"
            )
        if self._reference.revision not in (None, revision):
            raise UsageError(
                f"--revision {revision} and {self._options.source} name two revisions; leave one "
                "out"
            )
        return replace(self._reference, revision=revision)

    def _source(self, reference: HubReference) -> RemoteFiles:
        if reference.file:
            return self._file(reference, _CONFIG)
        repository = self._repository(reference)
        listed = bundle_files(repository)
        names: Sequence[str] = listed or checkpoint_files(
            str(reference),
            list(repository.sizes),
            without={f.name for f in fields(PartPaths) if getattr(self._options.parts, f.name)},
            full_precision=self._options.precision == "fp32",
        )
        return RemoteFiles(repository=repository, names=tuple(names), whole=bool(listed))

    def _lora(self, reference: HubReference) -> RemoteFiles:
        """A LoRA by its file, by PEFT's folder, or by the repository that has it alone."""
        repository = self._repository(reference)
        weights = [name for name in repository.sizes if name.endswith(WEIGHT_FILES)]
        if reference.file is None:
            if len(weights) != 1:
                raise UsageError(
                    f"{reference} holds {len(weights)} files of weights: "
                    f"{abbreviate(weights, 5) or 'none'}; name one: --lora "
                    f"hf://{reference}/{weights[0] if weights else 'FILE'}"
                )
            reference = replace(reference, file=weights[0])
        return replace(self._file(reference, LORA_CONFIG), whole=True)

    def _file(self, reference: HubReference, beside: str) -> RemoteFiles:
        """A file with what tells about it, or a folder of one part."""
        repository, path = self._repository(reference), reference.file or ""
        if path in repository.sizes:
            told = str(PurePosixPath(path).with_name(beside))
            names = [path, *(name for name in (told,) if name in repository.sizes)]
        else:
            names = [
                name
                for name in repository.sizes
                if str(PurePosixPath(name).parent) == path and name.endswith(_READ)
            ]
        if not path or not names:
            found = [name for name in repository.sizes if name.endswith(WEIGHT_FILES)]
            raise UsageError(
                f"{reference.repository} has no file {path or 'that is named'}; it has "
                f"{abbreviate(found, 5) or 'no weights'}"
            )
        return RemoteFiles(repository=repository, names=tuple(names), path=path)

    def _repository(self, reference: HubReference) -> Repository:
        key = (reference.repository, reference.revision)
        if key not in self._repositories:
            self._repositories[key] = open_repository(reference)
        return self._repositories[key]

    def _headers_of(self, files: RemoteFiles, progress: Progress) -> Path:
        repository = files.repository
        try:
            folder = tempfile.TemporaryDirectory(prefix="wanx-headers-")
            self._folders[folder] = repository
            count = step_counter(progress, "read headers", len(files.names))
            for name in files.names:
                target = Path(folder.name, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if cached := repository.cached(name):
                    target.symlink_to(cached)
                else:
                    with open_remote(repository, name) as remote:
                        sparse_copy(remote, repository.sizes[name], target)
                count()
        except OSError as error:
            raise WanxError(
                f"headers of {repository.reference} cannot be stored in {tempfile.gettempdir()}: "
                f"{error.strerror}; set TMPDIR to another folder"
            ) from None
        return Path(folder.name)
