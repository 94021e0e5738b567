"""Budget of pixels and seconds for decoding one media file, however little it weighs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path

from wanx.errors import UsageError

MAX_DECODED_PIXELS = 20_000_000_000  # almost 10,000 frames of 1920x1080
MAX_SECONDS = 60.0


class Budget:
    """Remaining budget of one pass over a file."""

    def __init__(self, path: Path) -> None:
        """Start with all of it; ``path`` is named where it does not suffice."""
        self._path = path
        self._pixels = 0
        self._seconds = 0.0

    def add_pixels(self, pixels: int) -> None:
        """Count pixels that were decoded.

        Raises:
            UsageError: They are too many.
        """
        self._pixels += pixels
        if self._pixels > MAX_DECODED_PIXELS:
            raise UsageError(
                f"{self._path} has more than {MAX_DECODED_PIXELS} pixels in all its frames; cut "
                f"it shorter or scale it down"
            )

    @contextmanager
    def seconds(self) -> Iterator[None]:
        """Count the time that the body takes.

        Raises:
            UsageError: It has become too long.
        """
        start = time.monotonic()
        yield
        self._seconds += time.monotonic() - start
        if self._seconds > MAX_SECONDS:
            raise _too_slow(self._path)


class TimedReader(BufferedReader):
    """File that its decoder reads until the seconds since its opening are spent."""

    def __init__(self, file: BufferedReader, path: Path) -> None:
        """Read an open file from its beginning; ``path`` is named in the error."""
        super().__init__(FileIO(file.fileno(), closefd=False))
        self.seek(0)
        self._path = path
        self._end = time.monotonic() + MAX_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as usual.

        Raises:
            UsageError: The time is over.
        """
        if time.monotonic() > self._end:
            raise _too_slow(self._path)
        return super().read(size)


def _too_slow(path: Path) -> UsageError:
    return UsageError(
        f"{path} takes more than {MAX_SECONDS:g} s to decode; save it again, shorter or smaller"
    )
