"""Files of repositories that are read in parts."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

from wanx.errors import EnvironmentMismatchError, WanxError
from wanx.hub.errors import one_line
from wanx.hub.repository import Repository

_BUFFER = 1 << 20
_TRIES = 3
_SECONDS = 30.0  # that the hub may keep silent


class _Ranges(io.RawIOBase):
    """A file whose every read is a request for a range of bytes."""

    def __init__(self, repository: Repository, name: str) -> None:
        from huggingface_hub import hf_hub_url

        self._repository, self._name = repository, name
        self._url = hf_hub_url(repository.reference.repository, name, revision=repository.commit)
        self._size, self._position = repository.sizes[name], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._size)
        if self._position >= end:
            return 0
        for tries in range(_TRIES):
            try:
                with one_line(self._repository.reference):
                    data = self._request(self._position, end)
                break
            except EnvironmentMismatchError:  # of the connection, for one
                if tries == _TRIES - 1:
                    raise
        buffer[: len(data)] = data
        self._position = end
        return len(data)

    def _request(self, begin: int, end: int) -> bytes:
        # Whatever compresses on the way makes the range one of other bytes.
        headers = _utils().build_hf_headers()
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
        with (
            _utils()
            .get_session()
            .stream(
                "GET", self._url, headers=headers, timeout=_SECONDS, follow_redirects=True
            ) as response
        ):
            if response.status_code >= 400:
                response.read()
                _utils().hf_raise_for_status(response)
            length = response.headers.get("Content-Length")
            data = b"" if length != str(end - begin) else response.read()
        if len(data) != end - begin:  # and a whole file of gigabytes is not read
            raise WanxError(
                f"{self._name} of {self._repository.reference} cannot be read in parts: "
                f"{end - begin} bytes were asked for, {length} came; download it with `hf download`"
            )
        return data


def _utils() -> Any:
    """Module whose documented functions are not marked as exported."""
    return import_module("huggingface_hub.utils")


def open_remote(repository: Repository, name: str) -> io.BufferedReader:
    """Open a file of a repository without downloading it; each part is fetched when read.

    Raises:
        WanxError: while reading, as :func:`wanx.hub.errors.one_line`.
    """
    return io.BufferedReader(_Ranges(repository, name), _BUFFER)
