"""Timing cache of TensorRT's builder, kept from one build to the next."""

from __future__ import annotations

from typing import Any

from wanx.files.cache import cache_path, read_cached, write_cached


class TimingCache:
    """TensorRT's timings of kernels, kept in the user's cache folder.

    Of TensorRT-RTX, which measures nothing while it builds, there is none. A file of another GPU or
    version is refused by TensorRT, one that is damaged likewise: then the cache starts empty.
    """

    def __init__(self, config: Any, name: str) -> None:
        """Load the timings that an earlier build left under ``name`` into a configuration."""
        self._config, self._file = config, cache_path("tensorrt", "timing", name)
        self._known = b""
        self._cache = None
        if not hasattr(config, "create_timing_cache"):
            return
        self._known = read_cached(self._file)
        for content in dict.fromkeys((self._known, b"")):
            self._cache = config.create_timing_cache(content)
            if self._cache is not None and config.set_timing_cache(self._cache, False):
                return
        self._cache = None

    def write(self) -> None:
        """Save what was added, whole or not at all."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if content and content != self._known:
            write_cached(self._file, content)
