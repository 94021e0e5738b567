"""Free memory as Linux and its control groups tell it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from wanx.runtime import available_memory as available
from wanx.runtime.available_memory import available_memory, usable_memory

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free, whose files of limits a test writes."""
    monkeypatch.setattr(available, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(available, "_CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc" / "meminfo", f"MemFree: 1 kB\nMemAvailable: {8 << 20} kB\n")
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(text))


def version_2(folder: Path, most: object, used: int, cache: int) -> None:
    write(folder / "memory.max", most)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", f"anon 7\ninactive_file {cache - 5}\nactive_file 5\n")


def version_1(folder: Path, most: int, used: int, cache: int) -> None:
    write(folder / "memory.limit_in_bytes", most)
    write(folder / "memory.usage_in_bytes", used)
    write(
        folder / "memory.stat",
        f"active_file 1\ninactive_file 0\ntotal_inactive_file 5\ntotal_active_file {cache - 5}\n",
    )


def test_this_machine() -> None:
    free = available_memory()
    if sys.platform == "linux":
        assert free is not None
        assert 1 << 20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_without_limits(system: Path) -> None:
    assert available_memory() == 8 * GIB


@pytest.mark.parametrize("folder", ["user/run", "user", ""])
@pytest.mark.parametrize(
    ("most", "used", "cache", "free"),
    [(4 * GIB, 3 * GIB, GIB, 2 * GIB), (GIB, 2 * GIB, 5, 0), (32 * GIB, 5, 5, 8 * GIB)],
)
def test_limits(most: int, used: int, cache: int, free: int, folder: str, system: Path) -> None:
    """Of the group, of one above, or of the container's root."""
    write(system / "proc" / "self" / "cgroup", "0::/user/run\n")
    version_2(system / "cgroup" / folder, most, used, cache)
    assert available_memory() == free
    write(system / "proc" / "self" / "cgroup", "5:cpu,memory:/user/run\n3:pids:/other\n")
    version_2(system / "cgroup" / folder, "max", 0, 0)
    version_1(system / "cgroup" / "memory" / folder, most, used, cache)
    assert available_memory() == free


def test_a_group_without_a_limit(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", "0::/\n")
    version_2(system / "cgroup", "max", GIB, 0)
    assert available_memory() == 8 * GIB


def test_a_system_that_does_not_tell(system: Path) -> None:
    (system / "proc" / "meminfo").unlink()
    assert available_memory() is None
    assert usable_memory() is None


@pytest.mark.parametrize(
    ("free", "usable"), [(8 * GIB, 0.92 * 8 * GIB), (GIB, GIB - (256 << 20)), (1, 0)]
)
def test_the_margin(free: int, usable: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "available_memory", lambda: free)
    assert usable_memory() == pytest.approx(usable, abs=1)
