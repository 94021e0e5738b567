"""Tiles cover every place once, fit, and recompute as little as any others."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from wanx.errors import UsageError, WanxError
from wanx.runtime.vae.tiles import plan_tiles, smallest_area, whole


@pytest.mark.parametrize("seed", range(40))
def test_every_place_is_kept_once(seed: int) -> None:
    draw = random.Random(seed)
    height, width, border = draw.randint(1, 90), draw.randint(1, 160), draw.randint(0, 14)
    least = smallest_area(height, width, border)
    tiling = plan_tiles(height, width, border, draw.randint(least, max(least, height * width)))
    count = np.zeros((height, width), int)
    source = np.arange(height * width).reshape(height, width)
    for tile in tiling.tiles:
        computed = source[tile.rows.source(), tile.columns.source()]
        kept = computed[tile.rows.inner(), tile.columns.inner()]
        place = tile.rows.place(), tile.columns.place()
        assert (source[place] == kept).all()
        count[place] += 1
        # A border on every side, unless the frame ends there.
        for span, length in ((tile.rows, height), (tile.columns, width)):
            assert span.outer_start == max(span.start - border, 0)
            assert span.outer_stop == min(span.stop + border, length)
    assert (count == 1).all()


@pytest.mark.parametrize(("height", "width"), [(60, 104), (90, 160), (31, 64), (8, 8)])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_no_other_grid_recomputes_less(height: int, width: int, share: float) -> None:
    border, area = 13, max(int(height * width * share), smallest_area(height, width, 13))
    tiling = plan_tiles(height, width, border, area)
    assert tiling.area <= area

    def outer(length: int, parts: int) -> list[int]:
        edges = [length * part // parts for part in range(parts + 1)]
        return [
            min(stop + border, length) - max(start - border, 0)
            for start, stop in itertools.pairwise(edges)
        ]

    least = min(
        sum(rows) * sum(columns) / (height * width)
        for rows, columns in itertools.product(
            [outer(height, n) for n in range(1, max(height // border, 1) + 1)],
            [outer(width, n) for n in range(1, max(width // border, 1) + 1)],
        )
        if max(rows) * max(columns) <= area
    )
    assert tiling.overhead == pytest.approx(least)


def test_a_frame_that_fits_is_whole() -> None:
    assert plan_tiles(60, 104, 13, 60 * 104).tiles == whole(60, 104).tiles
    assert whole(60, 104).overhead == 1


def test_strips_where_they_recompute_less() -> None:
    tiling = plan_tiles(60, 104, 13, 60 * 60)
    assert {tile.rows.outer for tile in tiling.tiles} == {60}


def test_what_is_too_small() -> None:
    least = smallest_area(60, 104, 13)
    assert least == (15 + 2 * 13) * (13 + 2 * 13)
    assert plan_tiles(60, 104, 13, least).area == least
    with pytest.raises(UsageError, match="has at least 1599 places with its border, and 1598 fit"):
        plan_tiles(60, 104, 13, least - 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_tile_is_cut_in_two(seed: int) -> None:
    """Down to single places, each of which is kept once and has its border."""
    draw = random.Random(seed)
    height, width, border = draw.randint(1, 40), draw.randint(1, 40), draw.randint(0, 5)
    tiling = plan_tiles(height, width, border, height * width)
    count = np.zeros((height, width), int)
    left = list(tiling.tiles)
    while left:
        tile = left.pop()
        if tile.rows.kept * tile.columns.kept == 1:
            count[tile.rows.place(), tile.columns.place()] += 1
            assert tile.area == np.prod(
                [
                    min(span.stop + border, length) - max(span.start - border, 0)
                    for span, length in ((tile.rows, height), (tile.columns, width))
                ]
            )
            with pytest.raises(WanxError, match="even the smallest tile"):
                tiling.cut(tile)
        else:
            halves = tiling.cut(tile)
            assert max(half.area for half in halves) <= tile.area
            left += halves
    assert (count == 1).all()
