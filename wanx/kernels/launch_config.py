"""Meta-parameters of kernels, and the ranking of attention backends, by GPU and shape.

The table is ``tuned.json`` beside this file. Each of its entries has an op, a GPU by its SM, the
sizes that it stands for, and what was found best there: the meta-parameters of the op's kernel, or
the ranking of backends of attention, fastest first. What was measured says on which machine, in
microseconds; ``null`` marks what follows from registers and shared memory alone, or from
experience elsewhere. Entries with no SM are for GPUs that have none of their own.

``python -m benchmarks.tuning.tune`` measures and writes new entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuned.json")
Choice = dict[str, int] | list[str]
_table: tuple[Entry, ...] | None = None
_overrides: dict[str, dict[str, int]] = {}
_rankings: dict[str, list[str]] = {}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Fastest configuration of an op on a GPU at a shape.

    Attributes:
        op: the op.
        sm: the GPU, such as 90; None for those without entries of the op.
        shape: sizes by name; one that is missing does not matter.
        choice: meta-parameters by name, or the ranking of backends.
        measured: GPU, versions and times; None where nothing was measured.
    """

    op: str
    sm: int | None
    shape: dict[str, int]
    choice: Choice
    measured: dict[str, Any] | None

    @property
    def key(self) -> tuple[str, int, tuple[tuple[str, int], ...]]:
        """Key of an entry, of which there is one for each."""
        return self.op, self.sm or 0, tuple(sorted(self.shape.items()))


def load_table(path: Path) -> list[Entry]:
    """Read a table."""
    return [Entry(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]


def dump_table(entries: Iterable[Entry], path: Path) -> None:
    """Write a table, an entry on each line, so that changes show."""
    by_key = sorted(entries, key=lambda entry: entry.key)
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in by_key)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def merge_entries(table: Iterable[Entry], new_entries: Iterable[Entry]) -> list[Entry]:
    """Add entries to a table; they replace those for the same op, GPU and shape."""
    return list({entry.key: entry for entry in (*table, *new_entries)}.values())


def nearest_entry(table: Iterable[Entry], op: str, sm: int, shape: Mapping[str, int]) -> Entry:
    """The entry of ``op`` and ``sm`` whose shape is nearest, else one for unknown GPUs.

    Sizes count by their ratio and in their order: the second decides between entries that are
    equally far by the first. An entry without a size is further than any that has it, and what was
    measured, and larger, is preferred where nothing else decides.

    Raises:
        KeyError: the table does not know the op.
    """
    known = [entry for entry in table if entry.op == op]
    candidates = [entry for entry in known if entry.sm == sm]
    candidates = candidates or [entry for entry in known if entry.sm is None]
    if not candidates:
        raise KeyError(f"{TABLE.name} has no entry of {op} for SM{sm}, nor one for unknown GPUs")

    def distance(entry: Entry) -> tuple[Any, ...]:
        ratios = (
            abs(math.log2(max(size, 1) / entry.shape[name])) if name in entry.shape else math.inf
            for name, size in shape.items()
        )
        return (*ratios, entry.measured is None, -sum(entry.shape.values()))

    return min(candidates, key=distance)


def set_table(table: Iterable[Entry]) -> None:
    """Look everything up in this table from now on, and not in the package's own."""
    global _table
    _table = tuple(table)
    _lookup.cache_clear()


@cache
def _lookup(op: str, sm: int, shape: tuple[tuple[str, int], ...]) -> Choice:
    return nearest_entry(_table or (), op, sm, dict(shape)).choice


def _choice(op: str, sm: int, shape: Mapping[str, Any]) -> Choice:
    if _table is None:
        set_table(load_table(TABLE))
    # A symbolic size, as in a graph while it is traced, must not be fixed by looking at it.
    return _lookup(op, sm, tuple((n, size) for n, size in shape.items() if isinstance(size, int)))


def config(op: str, sm: int, **shape: int) -> dict[str, int]:
    """The best known meta-parameters of an op's kernel.

    Args:
        op: the op.
        sm: the GPU, such as 90.
        shape: its sizes, the most important first; one that is symbolic is left out.

    Raises:
        KeyError: the table does not know the op.
    """
    if op in _overrides:
        return dict(_overrides[op])
    choice = _choice(op, sm, shape)
    assert isinstance(choice, dict)
    return dict(choice)


def backend_ranking(sm: int, *, bits: int, keys: int) -> list[str]:
    """Backends of attention whose operands have ``bits``, or more, from fast to slow.

    Args:
        sm: the GPU, such as 90.
        bits: 16 or 8.
        keys: how many each query attends to; left out if it is symbolic.
    """
    return ranking(f"attention_providers_{bits}bit", sm, keys=keys)


def ranking(op: str, sm: int, **shape: int) -> list[str]:
    """The implementations of an op, from fast to slow; arguments as of :func:`config`.

    Raises:
        KeyError: the table does not know the op.
    """
    if op in _rankings:
        return list(_rankings[op])
    choice = _choice(op, sm, shape)
    assert isinstance(choice, list)
    return list(choice)


@contextmanager
def with_ranking(op: str, names: list[str]) -> Iterator[None]:
    """Let ``op`` have these implementations alone, inside the block."""
    before = dict(_rankings)
    _rankings[op] = names
    try:
        yield
    finally:
        _rankings.clear()
        _rankings.update(before)


@contextmanager
def with_config(op: str, choice: dict[str, int]) -> Iterator[None]:
    """Run ``op`` with these meta-parameters everywhere, inside the block."""
    before = dict(_overrides)
    _overrides[op] = choice
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
