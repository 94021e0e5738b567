"""The files of a report, each of which appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from wanx.benchmarks.accuracy.comparison import Comparison, dumps
from wanx.benchmarks.accuracy.page import render
from wanx.benchmarks.report.html import require_packages
from wanx.errors import UsageError, WanxError


def prepare_folder(folder: Path) -> None:
    """Make sure, before anything is measured, that a report can be written into ``folder``.

    Raises:
        EnvironmentMismatchError: the packages of ``wanx[report]`` are missing.
        UsageError: there can be no such folder, or it cannot be written to.
    """
    require_packages()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the report needs a folder, and {folder} cannot be one: {error.strerror}; choose "
            "another"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be written to; choose another folder for the report")


def write_accuracy(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write ``accuracy.json`` and ``accuracy.html``, replacing those of an earlier comparison.

    Raises:
        EnvironmentMismatchError: the packages of ``wanx[report]`` are missing.
        UsageError: the folder cannot be had.
        WanxError: the disk is full.
    """
    prepare_folder(folder)
    data, page = folder / "accuracy.json", folder / "accuracy.html"
    write_files({data: dumps(comparison.to_json()), page: render(comparison)})
    return data, page


def write_files(texts: Mapping[Path, str]) -> None:
    """Write all files under temporary names, then rename them.

    Raises:
        WanxError: the disk is full or failing.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in texts}
    try:
        for path, text in texts.items():
            temporary[path].write_text(text, encoding="utf-8")
        for path, partial in temporary.items():
            os.replace(partial, path)
    except OSError as error:
        raise WanxError(
            f"the report cannot be written: {error.strerror} ({error.filename}); free some space "
            "or choose another folder"
        ) from None
    finally:
        for partial in temporary.values():
            with suppress(OSError):
                partial.unlink()
