"""Claims of output names, so that of processes beside each other only one makes a video.

A claim is a lock on a hidden file beside the output; it ends with its process, whatever ends that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from wanx.files.file_lock import locked_file


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claim the name of an output while the block runs.

    Yields:
        Whether the name is ours: False where another process has claimed it. Where no lock can be
        made, nothing is claimed, and True leaves it to the output's own checks to say why.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_file(path.with_name(f".wanx-{digest[:32]}.lock")))
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError):  # read-only or gone; a file system without locks
            pass
        yield True


@contextmanager
def claimed_names(candidates: Iterable[Path], count: int) -> Iterator[list[Path]]:
    """Claim the first ``count`` candidates that neither exist nor are claimed."""
    with ExitStack() as stack:
        names: list[Path] = []
        for path in candidates:
            if os.path.lexists(path):
                continue
            # The claim comes before the second look: its last holder may have written the file.
            if stack.enter_context(claimed(path)) and not os.path.lexists(path):
                names.append(path)
            if len(names) == count:
                break
        yield names
