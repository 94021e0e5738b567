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
def claimed_name(candidates: Iterable[Path]) -> Iterator[Path]:
    """Claim the first of endless candidates that neither exists nor is claimed."""
    for path in candidates:
        if os.path.lexists(path):
            continue
        with claimed(path) as ours:
            # Looked at again: the last holder of the claim may have written the file.
            if ours and not os.path.lexists(path):
                yield path
                return
    raise AssertionError("the candidates ended")
