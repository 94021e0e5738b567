"""Writing large files: hashed on the way, or copied by the kernel."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from wanx.errors import CorruptInputError, WanxError

_MAX_QUEUED_CHUNKS = 8


class HashingFile:
    """A new file of a known size; a context manager that leaves it whole or not at all.

    Attributes:
        path: where it is.
        size: bytes that it will have.
        sha256: digest of the finished file in hex; set by :meth:`close`.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Create the file, which must not exist.

        Raises:
            WanxError: the operating system refuses.
        """
        self.path, self.size, self.sha256 = path, size, ""
        self._written = 0
        self._digest = hashlib.sha256()
        try:
            self._file = path.open("xb", buffering=0)
        except OSError as error:
            raise self._failure(error) from None
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._queued: deque[Future[None]] = deque()

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append bytes; the chunk may be reused after the call.

        Raises:
            WanxError: the disk is full, another error of the operating system, or more bytes than
                the file should have.
        """
        view = memoryview(chunk).cast("B")
        if self._written + len(view) > self.size:
            raise WanxError(
                f"{self.path}: more bytes came than the {self.size} that its header "
                "describes; a tensor's source is longer than its shape"
            )
        # hashlib and write() both release the interpreter lock, so they run at the same time. A few
        # chunks may wait: handing over each one in lockstep costs a wake-up of the other thread.
        self._queued.append(self._executor.submit(self._digest.update, bytes(view)))
        if len(self._queued) > _MAX_QUEUED_CHUNKS:
            self._queued.popleft().result()
        try:
            while view:
                count = self._file.write(view)
                self._written += count
                view = view[count:]
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Check that every byte came, sync the file to disk and fix :attr:`sha256`.

        Raises:
            WanxError: bytes are missing, or the operating system could not store the file.
        """
        if self._written != self.size:
            raise WanxError(
                f"{self.path}: {self._written} of {self.size} bytes came; "
                "a tensor's source is shorter than its shape"
            )
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._failure(error) from None
        self._executor.shutdown()
        self.sha256 = self._digest.hexdigest()

    def abort(self) -> None:
        """Stop and remove the unfinished file."""
        self._executor.shutdown()
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the finished file, or remove it when it is not whole."""
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise

    def _failure(self, error: OSError) -> WanxError:
        return _write_failure(self.path, error, self._written, self.size)


class CopiedFile:
    """A copy of a file, made within the kernel where it can; whole or not at all."""

    def __init__(self, source: Path, target: Path, size: int) -> None:
        """Create the file, which must not exist.

        Raises:
            WanxError: the operating system refuses.
        """
        self.source, self.path, self.size = source, target, size
        self._copied = 0
        try:
            self._reader = source.open("rb", buffering=0)
            self._writer = target.open("xb", buffering=0)
        except OSError as error:
            raise _write_failure(target, error, 0, size) from None

    def copy(self, count: int) -> None:
        """Copy the next ``count`` bytes.

        Raises:
            CorruptInputError: the source ended.
            WanxError: the disk is full, or another error of the operating system.
        """
        end = self._copied + count
        try:
            while self._copied < end:
                copied = _copy_some(self._reader, self._writer, end - self._copied)
                if copied == 0:
                    raise CorruptInputError(
                        f"{self.source} ended after {self._copied} of {self.size} bytes; it was "
                        "cut while being read, so restore it and run again"
                    )
                self._copied += copied
        except OSError as error:
            raise _write_failure(self.path, error, self._copied, self.size) from None

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Sync the finished file to disk, or remove it when it is not whole."""
        self._reader.close()
        try:
            if kind is None:
                assert self._copied == self.size, "the whole file is copied"
                os.fsync(self._writer.fileno())
        except OSError as problem:
            kind = OSError
            raise _write_failure(self.path, problem, self._copied, self.size) from None
        finally:
            self._writer.close()
            if kind is not None:
                self.path.unlink(missing_ok=True)


def _copy_some(reader: FileIO, writer: FileIO, count: int) -> int:
    try:
        return os.copy_file_range(reader.fileno(), writer.fileno(), count)
    except AttributeError:  # only Linux has it
        pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    return writer.write(reader.read(min(count, 1 << 20)))


def _write_failure(path: Path, error: OSError, written: int, size: int) -> WanxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WanxError(
            f"cannot write {path}: the disk is full after {written} of {size} "
            f"bytes; free {size - written} bytes or choose another disk"
        )
    return WanxError(
        f"cannot write {path}: {error.strerror} after {written} of {size} "
        "bytes; check the folder and its permissions"
    )
