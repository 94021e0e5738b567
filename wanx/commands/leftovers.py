"""Hidden files that commands left in a folder when they were killed."""

from __future__ import annotations

from pathlib import Path


def find_leftovers(folder: Path, *, remove: bool = False) -> list[Path]:
    """List what killed commands left in ``folder``; remove it where asked.

    Locks tell what is left from what another process is writing.
    """
    from wanx.bundle import recovery
    from wanx.runtime.output import temporary

    return [
        *temporary.find_leftovers(folder, remove=remove),
        *recovery.find_leftovers(folder, remove=remove),
    ]
