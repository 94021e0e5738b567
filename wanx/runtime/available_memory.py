"""Memory of this machine that is free, within the limit of the container."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Version 2 and version 1: the limit and what is used, pages of files among it.
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
_PAGES = ("inactive_file", "active_file")
_MARGIN = 0.08  # of what is free, for what else runs
_LEAST_MARGIN = 256 << 20


def available_memory() -> int | None:
    """Bytes of host memory that are free, caches included; None where the system does not tell."""
    free = [*_limits()]
    with suppress(OSError, StopIteration):
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free.append(int(kib) << 10)
    return min(free, default=None)


def usable_memory() -> int | None:
    """Free bytes less a margin; None where the system does not tell."""
    free = available_memory()
    return None if free is None else max(free - max(int(_MARGIN * free), _LEAST_MARGIN), 0)


def _limits() -> Iterator[int]:
    """Free bytes within each limit of the control groups of this process."""
    with suppress(OSError, ValueError):
        for line in (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            # Groups above have limits too, and in a container the root is often the group itself.
            own = root / path.lstrip("/")
            above = [parent for parent in own.parents if parent.is_relative_to(root)]
            for folder in (own, *above):
                for limit, used in _FILES:
                    with suppress(OSError, ValueError):
                        most = int((folder / limit).read_text())
                        yield max(most - int((folder / used).read_text()) + _cache(folder), 0)


def _cache(folder: Path) -> int:
    with suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text().splitlines()
        sizes = {name: int(size) for name, size in (line.split() for line in lines)}
        # Of version 1 the totals include the groups below.
        return sum(sizes.get(f"total_{name}", sizes.get(name, 0)) for name in _PAGES)
    return 0
