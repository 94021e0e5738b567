"""Markers of the compiled engines that were built on this machine.

A compiled engine is a program: loading one runs whatever is in it, which no hash in its own bundle
can vouch for. So building leaves a marker in the user's cache folder, and engines without one are
not loaded unless the user says that their origin is trusted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from wanx.bundle.manifest import FileRecord
from wanx.bundle.reader import Bundle
from wanx.errors import EnvironmentMismatchError
from wanx.files.cache import cache_path

TRUST_VARIABLE = "WANX_TRUST_ENGINES"


def mark_trusted(engine: str, files: Mapping[str, FileRecord]) -> bool:
    """Remember that the engine whose schedule is ``engine`` was built here, with these files.

    Returns False where there is no cache folder that can be written.
    """
    marker = _trust_marker(engine, files)
    if marker is None:
        return False
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        return False
    return True


def is_trusted(engine: str, files: Mapping[str, FileRecord]) -> bool:
    """True if the engine whose schedule is ``engine`` was built here, or all are trusted."""
    marker = _trust_marker(engine, files)
    return os.environ.get(TRUST_VARIABLE) == "1" or (marker is not None and marker.exists())


def require_trusted(bundle: Bundle, component: str, target: str) -> None:
    """Refuse a compiled engine that comes from elsewhere.

    Raises:
        EnvironmentMismatchError: says how to build it here, or to trust it.
    """
    engine = bundle.manifest.components[component].engines[target]
    if is_trusted(engine, bundle.manifest.files):
        return
    raise EnvironmentMismatchError(
        f"the engines of {bundle.root} were compiled elsewhere, and a compiled engine can do "
        f"anything: run `{bundle.build_command(target)}`, or set {TRUST_VARIABLE}=1 if you trust "
        "where it comes from"
    )


def _trust_marker(engine: str, files: Mapping[str, FileRecord]) -> Path | None:
    """Path of an engine's marker; its name is a digest of every byte in the engine's folder."""
    folder = PurePosixPath(engine).parent
    facts = [
        f"{p} {r.sha256}" for p, r in sorted(files.items()) if folder in PurePosixPath(p).parents
    ]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return cache_path("built", digest)
