"""Runtime cache of TensorRT-RTX's just-in-time kernels, in the user's cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from wanx.files.cache import cache_path, read_cached, write_cached


class RuntimeCache:
    """The kernels of one engine on one kind of GPU.

    A file from another GPU, driver or version is refused by TensorRT, which changes nothing; one
    that cannot be read or written is done without.
    """

    def __init__(self, config: Any, engine: Path, version: str, sm: str) -> None:
        """Load the cache that an earlier run saved into a runtime configuration."""
        self._cache = config.create_runtime_cache()
        key = hashlib.sha256(engine.read_bytes()).hexdigest()[:32]
        self._file = cache_path("tensorrt", "kernels", f"{key}-{version}-{sm}")
        self._known = read_cached(self._file)
        if self._known:
            self._cache.deserialize(self._known)
        config.set_runtime_cache(self._cache)

    def write(self) -> None:
        """Save what was added, whole or not at all."""
        content = self._cache.serialize()
        if content is not None and bytes(content) != self._known:
            write_cached(self._file, bytes(content))
