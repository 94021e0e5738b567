"""Order of the calls of a part, and what is held between them."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any, cast

import pytest

from wanx.runtime.sessions.base import Session
from wanx.runtime.vae.chunks import calls
from wanx.runtime.vae.tiles import Tile, Tiling, plan_tiles, whole

SESSION = cast(Session, object())


class Value:
    """Something large."""


def names(opened: list[str]) -> Any:
    def open_session(name: str) -> Any:
        opened.append(name)
        return nullcontext(SESSION)

    return open_session


@pytest.fixture
def tiling() -> Tiling:
    return plan_tiles(40, 8, 2, 15 * 8)


def test_nothing_of_a_tile_is_held_when_the_next_is_weighed(tiling: Tiling) -> None:
    kept: list[weakref.ref[Value]] = []
    asked: list[Tile] = []

    def fits(tile: Tile) -> bool:
        asked.append(tile)
        assert [reference for reference in kept if reference() is not None] == []
        return True

    for call in calls(names([]), "part", [2, 1], tiling, fits):
        value = call.state.setdefault("x", Value())
        if not call.index:
            kept.append(weakref.ref(value))
        del value
    assert asked == 2 * list(tiling.tiles[1:])


def test_order_of_tiles(tiling: Tiling) -> None:
    """Each tile goes through its clip, with both graphs loaded once."""
    opened: list[str] = []
    made = [
        (call.clip, call.tile, call.index, call.ends_frame)
        for call in calls(names(opened), "part", [2, 1], tiling)
    ]
    last = tiling.tiles[-1]
    assert made == [
        (clip, tile, index, tile == last)
        for clip, length in enumerate([2, 1])
        for tile in tiling.tiles
        for index in range(length)
    ]
    assert opened == ["part_first", "part_rest"]


def test_order_of_whole_frames() -> None:
    """The first chunks of all clips come first, as one graph is loaded at a time."""
    opened: list[str] = []
    made = [
        (call.clip, call.index, call.ends_frame, len(opened))
        for call in calls(names(opened), "part", [3, 1, 2], whole(4, 4))
    ]
    assert made == [
        *((clip, 0, True, 1) for clip in range(3)),
        *((0, 1, True, 2), (0, 2, True, 2), (2, 1, True, 2)),
    ]


def test_a_tile_that_does_not_fit_is_cut(tiling: Tiling) -> None:
    sizes, places = [], 0
    for call in calls(names([]), "part", [1], tiling, lambda tile: tile.rows.kept <= 4):
        sizes.append(call.tile.rows.kept)
        places += call.tile.rows.kept * call.tile.columns.kept
        assert call.ends_frame == (places == 40 * 8)
    assert sizes[0] > 4
    assert max(sizes[1:]) <= 4
    assert places == 40 * 8
