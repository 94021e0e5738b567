"""Files that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Path of a temporary file beside ``path``, renamed to it when the block ends without error.

    Two processes that write the same path do not disturb each other: the last rename wins.

    Raises:
        OSError: the file cannot be renamed.
    """
    temporary = path.with_name(f".{path.name:.200}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
