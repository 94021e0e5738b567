from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tuning.workloads import BACKEND_BITS, GRIDS, OPS, configured, workload
from wanx.kernels import launch_config
from wanx.kernels.aot_compile import record
from wanx.kernels.attention.backends import BACKENDS, ranked_backends
from wanx.kernels.launch_config import (
    Entry,
    config,
    dump_table,
    load_table,
    merge_entries,
    nearest_entry,
    with_config,
)

TABLE = load_table(launch_config.TABLE)


@pytest.fixture(autouse=True)
def _own_table() -> Iterator[None]:
    yield
    launch_config.set_table(TABLE)


def entry(
    sm: int | None = 90, op: str = "op", best: int = 0, measured: Any = None, **shape: int
) -> Entry:
    return Entry(op=op, sm=sm, shape=shape, choice={"best": best}, measured=measured)


def best(table: list[Entry], sm: int = 90, op: str = "op", **shape: int) -> int:
    choice = nearest_entry(table, op, sm, shape).choice
    assert isinstance(choice, dict)
    return choice["best"]


def test_an_unknown_gpu_has_the_defaults() -> None:
    table = [entry(None, best=1), entry(90, best=2), entry(90, op="other", best=3)]
    assert best(table, sm=90) == 2
    assert best(table, sm=75) == 1
    with pytest.raises(KeyError, match=r"no entry of other for SM80, nor one for unknown GPUs"):
        best(table, sm=80, op="other")


def test_the_nearest_shape_counts_by_ratio() -> None:
    table = [entry(best=1, dim=1000), entry(best=2, dim=4000)]
    assert [best(table, dim=dim) for dim in (0, 1, 1999, 2001, 99999)] == [1, 1, 1, 2, 2]


def test_the_first_size_decides_before_the_second() -> None:
    table = [
        entry(best=1, head=128, keys=30000),
        entry(best=2, head=128, keys=500),
        entry(best=3, head=256),
    ]
    assert best(table, head=128, keys=70000) == 1
    assert best(table, head=128, keys=600) == 2
    assert best(table, head=200, keys=600) == 3


def test_a_size_that_an_entry_leaves_out_is_further_than_any() -> None:
    table = [entry(best=1), entry(best=2, dim=1)]
    assert best(table, dim=10**6) == 2


def test_what_was_measured_and_larger_comes_first_where_sizes_do_not_decide() -> None:
    table = [
        entry(best=1, keys=99),
        entry(best=2, measured={}, keys=8),
        entry(best=3, measured={}, keys=9),
    ]
    assert best(table) == 3


def test_symbolic_sizes_are_not_looked_at() -> None:
    launch_config.set_table([entry(best=1, dim=10, keys=10), entry(best=2, dim=10, keys=20)])
    symbolic: Any = object()
    assert config("op", 90, dim=12, keys=symbolic) == {"best": 2}
    assert config("op", 90, dim=12, keys=11) == {"best": 1}


def test_results_replace_entries_of_the_same_shape(tmp_path: Path) -> None:
    old = [entry(best=1, dim=1), entry(best=2, dim=2), entry(None, best=3)]
    new = entry(best=4, dim=2, measured={"gpu": "one", "us": {"best=4": 1.5}})
    dump_table(merge_entries(old, [new]), tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == [old[2], old[0], new]


def test_choices_are_copies() -> None:
    config("gated_residual", 90)["TOKENS"] = 0
    assert config("gated_residual", 90)["TOKENS"] > 0


def test_an_override_ends_with_its_block() -> None:
    before = config("quantize", 90, width=1536)
    with with_config("quantize", {"num_warps": 1}):
        assert config("quantize", 90, width=1536) == {"num_warps": 1}
        assert config("adaln", 90, dim=1536) != {"num_warps": 1}
        with with_config("quantize", {"num_warps": 2}):
            assert config("quantize", 90) == {"num_warps": 2}
        assert config("quantize", 90) == {"num_warps": 1}
    assert config("quantize", 90, width=1536) == before


def test_the_table_is_whole_and_as_it_is_written(tmp_path: Path) -> None:
    dump_table(TABLE, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == launch_config.TABLE.read_text()
    assert {found.op for found in TABLE if found.sm is None} >= set(OPS)
    for found in TABLE:
        if found.op in BACKEND_BITS:
            assert {BACKENDS[name].bits for name in found.choice} >= {BACKEND_BITS[found.op]}
        elif found.op in GRIDS:
            assert found.choice.keys() == GRIDS[found.op].keys()
        if found.measured is not None:
            assert found.measured.keys() == {"gpu", "torch", "triton", "us"}
            assert found.sm is not None
    json.dumps([found.measured for found in TABLE])


@pytest.mark.parametrize("op", GRIDS)
def test_kernels_run_with_what_the_table_says(op: str) -> None:
    """Each with a choice that no table holds, and none with what is meant for another op."""
    choice = {name: 2 * max(numbers) for name, numbers in GRIDS[op].items()}
    small = workload(op, (256, 2, 512), 40, 40, torch.device("meta"))
    call = configured(op, choice, lambda: small.prepare()[0].call(), 90)[0].call
    others = {other: {"num_warps": 1} for other in GRIDS if other != op}
    decoys = [Entry(op=o, sm=None, shape={}, choice=c, measured=None) for o, c in others.items()]
    launch_config.set_table([entry(None, op=op), *decoys])
    last = record(90, call)[-1]
    assert {name: (last.constants | last.options)[name] for name in choice} == choice


def test_tma_is_off_until_it_is_measured() -> None:
    for found in TABLE:
        if isinstance(found.choice, dict) and found.measured is None:
            assert not found.choice.get("TMA")
            assert not found.choice.get("WARP_SPECIALIZE")


def test_order_of_providers() -> None:
    """As it was before there was a table, with the two that are not measured behind the others."""

    def names(sm: int, bits: int) -> list[str]:
        return [provider.name for provider in ranked_backends(sm, bits=bits, keys=32760)]

    assert names(90, 16) == ["cudnn", "flash", "fa3", "triton"]
    assert names(89, 16) == ["flash", "cudnn", "triton"]
    assert names(100, 8) == ["triton-8bit", "cudnn-fp8", "cudnn", "flash", "fa3", "triton"]
    tuned = ["cudnn", "triton-8bit"]
    op = "attention_providers_8bit"
    found = Entry(op=op, sm=90, shape={"keys": 512}, choice=tuned, measured={})
    launch_config.set_table(merge_entries(TABLE, [found]))
    assert names(90, 8) == [*tuned, "flash", "fa3", "triton"]
