"""Runtime cache of TensorRT-RTX's just-in-time kernels, in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs


class RuntimeCache:
    """The kernels of one engine on one kind of GPU.

    A file from another GPU, driver or version is refused by TensorRT, which changes nothing; one
    that cannot be read or written is done without.
    """

    def __init__(self, config: Any, engine: Path, version: str, sm: str) -> None:
        """Load the cache that an earlier run saved into a runtime configuration."""
        self._cache = config.create_runtime_cache()
        self._file = _file(engine, version, sm)
        self._known = b""
        if self._file is not None:
            with suppress(OSError):
                self._known = self._file.read_bytes()
        if self._known:
            self._cache.deserialize(self._known)
        config.set_runtime_cache(self._cache)

    def write(self) -> None:
        """Save what was added, whole or not at all."""
        content = self._cache.serialize()
        if content is None or self._file is None or bytes(content) == self._known:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, fresh = tempfile.mkstemp(dir=self._file.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                Path(fresh).replace(self._file)
            except BaseException:
                Path(fresh).unlink(missing_ok=True)
                raise


def _file(engine: Path, version: str, sm: str) -> Path | None:
    cache = platformdirs.user_cache_path("wanx", appauthor=False)
    if not cache.is_absolute():  # there is no home folder
        return None
    key = hashlib.sha256(engine.read_bytes()).hexdigest()[:32]
    return cache / "tensorrt" / "kernels" / f"{key}-{version}-{sm}"
