"""Timing cache of TensorRT's builder, kept from one build to the next."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs


class TimingCache:
    """TensorRT's timings of kernels, kept in the user's cache folder.

    Of TensorRT-RTX, which measures nothing while it builds, there is none. A file of another GPU or
    version is refused by TensorRT, one that is damaged likewise: then the cache starts empty.
    """

    def __init__(self, config: Any, name: str) -> None:
        """Load the timings that an earlier build left under ``name`` into a configuration."""
        self._config, self._known, self._file = config, b"", _file(name)
        self._cache = None
        if not hasattr(config, "create_timing_cache"):
            return
        if self._file is not None:
            with suppress(OSError):
                self._known = self._file.read_bytes()
        for content in dict.fromkeys((self._known, b"")):
            self._cache = config.create_timing_cache(content)
            if self._cache is not None and config.set_timing_cache(self._cache, False):
                return
        self._cache = None

    def write(self) -> None:
        """Save what was added, whole or not at all."""
        if self._cache is None or self._file is None:
            return
        content = bytes(self._cache.serialize())
        if not content or content == self._known:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, fresh = tempfile.mkstemp(dir=self._file.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(fresh, self._file)


def _file(name: str) -> Path | None:
    cache = platformdirs.user_cache_path("wanx", appauthor=False)
    if not cache.is_absolute():  # there is no home folder
        return None
    return cache / "tensorrt" / "timing" / name
