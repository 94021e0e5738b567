"""The built-in model at every precision, measured once for all tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.paths import TOOLS

# The tools are scripts beside each other, so tests import them from there.
sys.path[:0] = [str(TOOLS / folder) for folder in ("", "accuracy", "tiny")]

if TYPE_CHECKING:
    from figures import Measured

    from wanx.bundle.reader import Bundle


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bundles of ``measured`` lie, ``<precision>`` each; tests must not change them."""
    return tmp_path_factory.mktemp("accuracy")


@pytest.fixture(scope="session")
def measured(export_quickly: Callable[..., Bundle], bundle_folder: Path) -> dict[str, Measured]:
    from figures import measure_all

    def export(precision: str, output: Path) -> Bundle:
        return export_quickly("tiny", output, precision=precision)

    return measure_all(export, bundle_folder)
