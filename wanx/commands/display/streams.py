"""Standard output and error that take any text, and whose failure costs no work."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from wanx.errors import WanxError


class _Descriptor(io.FileIO):
    """File descriptor that drops what it cannot write, and remembers the first error."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


@contextmanager
def lossless_streams() -> Iterator[None]:
    r"""Let ``sys.stdout`` and ``sys.stderr`` fail inside the block without an exception.

    Characters that an encoding lacks are written as ``\xb7``, ``\u4e2d`` and the like. Streams that
    were closed before the process began lead to ``os.devnull``. Output to a full disk or a reader
    that is gone is dropped, so that hours of computing are not lost with one line.

    Raises:
        SystemExit: at the end of the block, with 1 instead of 0 if standard output was dropped.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, output = _tolerant(sys.stdout, 1)
    sys.stderr, _ = _tolerant(sys.stderr, 2)
    try:
        try:
            yield
        except SystemExit as end:
            if end.code:
                raise
        sys.stdout.flush()
        if output is not None and output.error is not None:
            # A reader that is gone, such as head, has seen what it wanted.
            if output.error.errno != errno.EPIPE:
                print(f"error: what was printed is lost: {output.error.strerror}", file=sys.stderr)
            raise SystemExit(WanxError.exit_code)
        raise SystemExit(0)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Open the standard descriptors that are closed, lest the next file be taken for one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _tolerant(stream: TextIO | None, descriptor: int) -> tuple[Any, _Descriptor | None]:
    encoding = "utf-8" if stream is None else stream.encoding
    buffer = getattr(stream, "buffer", None)
    if stream is not None and not isinstance(getattr(buffer, "raw", buffer), io.FileIO):
        if isinstance(stream, io.TextIOWrapper):  # in memory
            stream.reconfigure(errors="backslashreplace")
        return stream, None
    at_once = isinstance(stream, io.TextIOWrapper) and (
        bool(stream.line_buffering) or stream.write_through
    )
    raw = _Descriptor(descriptor, "w", closefd=False)
    return (
        io.TextIOWrapper(
            io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=at_once
        ),
        raw,
    )
