"""Opens a bundle and proves that it is whole and safe.

Opening writes nothing into it, and removes only what processes that were killed had left.

manifest.json                  see wanx.bundle.manifest
graphs/<component>.onnx        external data relative to the bundle: "weights/dit.safetensors"
weights/*.safetensors
engines/<key>/...              what a target built
tokenizer/tokenizer.json
golden/*.safetensors
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from wanx.bundle.integrity import RECOPY_HINT, Verify, find_problems, regular_file_problem
from wanx.bundle.manifest import (
    MANIFEST,
    TOKENIZER,
    Component,
    FileRecord,
    Manifest,
    Provenance,
    parse_manifest,
)
from wanx.bundle.record import printable
from wanx.bundle.recovery import recover, remove_unlisted
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.files.checksum import DigestCache
from wanx.files.held_directory import HeldDirectory
from wanx.files.hub_cache import is_snapshot

__all__ = [
    "Bundle",
    "Component",
    "FileCheck",
    "FileRecord",
    "Manifest",
    "Provenance",
    "Verify",
    "open_bundle",
    "read_bundle",
    "verify_bundle",
]

_MAX_MANIFEST_BYTES = 8 << 20
_ATTEMPTS = 3  # to hold a folder that is being replaced


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        root: its folder.
        manifest: what is in it.
        hash: SHA-256 of the manifest in hex, which covers every byte of the bundle.
        directory: keeps the files that were verified, even when the bundle is replaced.
    """

    root: Path
    manifest: Manifest
    hash: str
    directory: HeldDirectory | None = field(default=None, repr=False, compare=False)

    def held(self, file: str | Path) -> Path:
        """Path of one of the bundle's files that stays the same file as long as this object lives.

        Args:
            file: its name in the manifest, or its path below ``root``.
        """
        root = self.root if self.directory is None else self.directory.path
        return root / (file if isinstance(file, str) else file.relative_to(self.root))

    def build_command(self, target: str, *, force: bool = False) -> str:
        """Command that builds this bundle's engines for a target, for a shell.

        In the hub's cache nothing is built, so that a copy is made first.
        """
        folder, copy = shlex.quote(str(self.root)), ""
        if is_snapshot(self.root):
            copy, folder = f"cp -RL {folder} NEW && ", "NEW"
        command = f"{copy}wanx build {folder} --target {target}"
        return f"{command} --force" if force else command

    @contextmanager
    def names_in_errors(self) -> Iterator[None]:
        """Let errors name files as the user knows them, not by their held paths."""
        try:
            yield
        except WanxError as error:
            error.args = (str(error).replace(f"{self.held('')}", str(self.root)),)
            raise

    def graph_path(self, component: str) -> Path:
        """The ONNX file of a component.

        Raises:
            UsageError: the bundle has no such component.
        """
        components = self.manifest.components
        if component not in components:
            raise UsageError(
                f"{self.root}: no component {component!r} in this {self.manifest.task} bundle, "
                f"which has {', '.join(sorted(components)) or 'none'}"
            )
        return self.root / components[component].graph

    @property
    def tokenizer_path(self) -> Path:
        """The ``tokenizer.json`` of the text encoder.

        Raises:
            CorruptInputError: the bundle was made without one.
        """
        if TOKENIZER not in self.manifest.files:
            raise CorruptInputError(
                f"{self.root}: {TOKENIZER} is not in the manifest: {RECOPY_HINT}"
            )
        return self.root / TOKENIZER

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that the manifest lists."""
        return sum(record.size for record in self.manifest.files.values())


@dataclass(frozen=True)
class FileCheck:
    """Verification of one file of a bundle; ``problem`` is None when it is good."""

    path: str
    problem: str | None


def open_bundle(
    path: str | Path,
    *,
    verify: Verify = "auto",
    on_bytes: Callable[[int], None] | None = None,
    allow_hard_links: bool = False,
) -> Bundle:
    """Open a bundle after checking it.

    Args:
        path: folder of the bundle.
        verify: ``full`` hashes every file; ``auto`` only those not yet hashed since they last
            changed; ``size`` compares sizes alone. Everything else is always checked.
        on_bytes: told the bytes verified so far, in portions that add up to ``size_bytes`` (not
            called for ``size``).
        allow_hard_links: for the bundle inside the installed package, which installers link.

    Raises:
        UsageError: there is no bundle at ``path``.
        CorruptInputError: the bundle is damaged, incomplete or unsafe.
        EnvironmentMismatchError: a newer wanx wrote the bundle.
    """
    bundle = read_bundle(path)
    for _, problem in _problems(bundle, verify, on_bytes, allow_hard_links):
        if read_bundle(path).hash != bundle.hash:  # replaced meanwhile, where no lock holds it
            return open_bundle(
                path, verify=verify, on_bytes=on_bytes, allow_hard_links=allow_hard_links
            )
        raise CorruptInputError(f"{bundle.root}: {problem}")
    return bundle


def verify_bundle(
    bundle: Bundle,
    *,
    on_bytes: Callable[[int], None] | None = None,
    allow_hard_links: bool = False,
) -> list[FileCheck]:
    """Hash every file of a bundle and report on all of them, sorted by path."""
    problem_by_file: dict[str, str] = {}
    for name, problem in _problems(bundle, "full", on_bytes, allow_hard_links):
        problem_by_file.setdefault(name, problem)
    names = sorted({*bundle.manifest.files, *problem_by_file})
    return [FileCheck(name, problem_by_file.get(name)) for name in names]


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle's manifest and check nothing else.

    Raises:
        UsageError, CorruptInputError, EnvironmentMismatchError: as ``open_bundle``.
    """
    try:
        root = Path(os.path.realpath(path))
        directory = _hold(root)
        if directory is None:
            what = "is a file, not a bundle's folder" if root.exists() else "does not exist"
            raise UsageError(f"{printable(path)} {what}: give a folder made by wanx export")
        if not os.path.lexists(directory.path / MANIFEST):
            raise CorruptInputError(f"{root}: not a wanx bundle, it has no {MANIFEST}")
        problem = regular_file_problem(directory.path, MANIFEST, allow_hard_links=True)
        if problem:
            raise CorruptInputError(f"{root}: {problem}")
        with (directory.path / MANIFEST).open("rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except ValueError:
        raise UsageError(f"{printable(path)} is not a possible path") from None
    except OSError as error:
        raise WanxError(f"{path} cannot be read: {error.strerror}") from None
    manifest = root / MANIFEST
    if len(data) > _MAX_MANIFEST_BYTES:
        raise CorruptInputError(
            f"{manifest}: larger than {_MAX_MANIFEST_BYTES} bytes: {RECOPY_HINT}"
        )
    parsed = parse_manifest(data, manifest)
    if not is_snapshot(root):
        remove_unlisted(root, parsed, directory)
    return Bundle(root, parsed, hashlib.sha256(data).hexdigest(), directory)


def _hold(root: Path) -> HeldDirectory | None:
    """Hold a bundle's folder; None where there is none.

    Between two renames of an export that replaces it there is none either, for a moment.
    """
    for _ in range(_ATTEMPTS):
        recover(root)
        if root.is_dir():
            with suppress(FileNotFoundError, NotADirectoryError):
                return HeldDirectory(root)
    return None


def _problems(
    bundle: Bundle,
    verify: Verify,
    on_bytes: Callable[[int], None] | None,
    allow_hard_links: bool,
) -> Iterator[tuple[str, str]]:
    """Yield the problems of a bundle; see :func:`find_problems`."""
    digests = DigestCache(bundle.root)
    return find_problems(
        bundle.held(""), bundle.manifest, verify, digests, on_bytes, allow_hard_links
    )
