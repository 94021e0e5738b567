"""Report files: JSON that any parser takes, each file written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from wanx.benchmarks.report.html import require_packages
from wanx.errors import UsageError, WanxError
from wanx.files.atomic import replacing


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


def json_safe(value: Any, not_finite: Callable[[float], Any] = lambda number: None) -> Any:
    """The value as strict JSON has it, which has neither NaN nor infinity.

    Args:
        value: mappings, sequences, numbers, text.
        not_finite: what stands for NaN and infinities; null unless given.
    """
    if isinstance(value, Mapping):
        return {name: json_safe(item, not_finite) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item, not_finite) for item in value]
    return not_finite(value) if isinstance(value, float) and not math.isfinite(value) else value


def dumps(document: Any) -> str:
    """Write a document as JSON that any parser takes."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_files(texts: Mapping[Path, str]) -> None:
    """Write all files under temporary names, then rename them.

    Raises:
        WanxError: the disk is full or failing.
    """
    try:
        with ExitStack() as stack:
            for path, text in texts.items():
                stack.enter_context(replacing(path)).write_text(text, encoding="utf-8")
    except OSError as error:
        raise WanxError(
            f"the report cannot be written: {error.strerror} ({error.filename}); free some space "
            "or choose another folder"
        ) from None
