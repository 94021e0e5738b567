"""The command line in the tests' own process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a command left: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failed command prints."""
        assert "Traceback" not in self.err
        (line,) = self.err.strip().splitlines()
        return line


Wanx = Callable[..., Outcome]
