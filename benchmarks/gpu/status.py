"""What a process that measures is about, for whoever finds it dead."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

STATUS = "status.json"
EXIT_DEVICE_LOST = 75  # exit code of a process whose device does not answer any more


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is being run.

    Attributes:
        item: that it measures.
        subject: that it last began to run.
        until: when it should be done, by :func:`time.time`.
        reason: why it gave up.
    """

    item: str
    subject: str | None
    until: float
    reason: str | None = None

    def write(self, folder: Path) -> None:
        """Put it where :meth:`read` finds it."""
        (folder / STATUS).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def forget(folder: Path) -> None:
        """Nothing is being run."""
        (folder / STATUS).unlink(missing_ok=True)

    @staticmethod
    def read(folder: Path) -> Status | None:
        """What was written last."""
        try:
            return Status(**json.loads((folder / STATUS).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
