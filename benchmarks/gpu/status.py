"""Status file by which the supervisor learns what a crashed worker was running."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

STATUS = "status.json"
EXIT_DEVICE_LOST = 75  # of a process whose GPU answers no more


@dataclass(frozen=True, kw_only=True)
class Status:
    """Position of a worker.

    Attributes:
        item: that it measures.
        subject: that it last began to run.
        until: when it should be done, by :func:`time.time`; a worker beyond that hangs.
        reason: why it gave up.
    """

    item: str
    subject: str | None
    until: float
    reason: str | None = None

    def write(self, folder: Path) -> None:
        """Put it where :meth:`read` looks for it, whole or not at all."""
        partial = folder / f"{STATUS}.partial"
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(partial, folder / STATUS)

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove what a worker before left."""
        (folder / STATUS).unlink(missing_ok=True)

    @staticmethod
    def read(folder: Path) -> Status | None:
        """The status that was written last; None before the first."""
        try:
            return Status(**json.loads((folder / STATUS).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
