"""Tiles of frames with borders as wide as the graph's reach, so that their inner parts are exact.

Sides are in latent rows and columns, of which each stands for several of the video's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wanx.errors import UsageError, WanxError


@dataclass(frozen=True)
class Span:
    """Rows or columns of a tile.

    Attributes:
        start: first of those that are kept.
        stop: one past the last of them.
        outer_start: first of those that are computed; before ``start`` lies the border.
        outer_stop: one past the last of them.
    """

    start: int
    stop: int
    outer_start: int
    outer_stop: int

    @property
    def outer(self) -> int:
        """How many are computed."""
        return self.outer_stop - self.outer_start

    @property
    def kept(self) -> int:
        """How many are kept of these."""
        return self.stop - self.start

    def inner(self, scale: int = 1) -> slice:
        """What is kept of what is computed, with ``scale`` of the video's for each."""
        return slice(
            (self.start - self.outer_start) * scale, (self.stop - self.outer_start) * scale
        )

    def place(self, scale: int = 1) -> slice:
        """Where that goes in the whole."""
        return slice(self.start * scale, self.stop * scale)

    def source(self, scale: int = 1) -> slice:
        """What is computed, of the whole."""
        return slice(self.outer_start * scale, self.outer_stop * scale)


@dataclass(frozen=True)
class Tile:
    """A part of a frame."""

    rows: Span
    columns: Span

    @property
    def area(self) -> int:
        """Latent places that are computed."""
        return self.rows.outer * self.columns.outer


@dataclass(frozen=True)
class Tiling:
    """Tiles that cover a frame, each place of it once.

    Attributes:
        height: of the frame, in latent rows.
        width: of the frame, in latent columns.
        tiles: from left to right, then down.
        border: latent rows and columns around a tile that it depends on.
    """

    height: int
    width: int
    tiles: tuple[Tile, ...]
    border: int = 0

    @property
    def area(self) -> int:
        """Places of the largest tile, borders included."""
        return max(tile.area for tile in self.tiles)

    @property
    def overhead(self) -> float:
        """What is computed as a multiple of the frame."""
        return sum(tile.area for tile in self.tiles) / (self.height * self.width)

    def cut(self, tile: Tile) -> tuple[Tile, Tile]:
        """Cut a tile in two, across its longer side.

        Raises:
            WanxError: it has one place.
        """
        rows, columns = tile.rows, tile.columns
        if rows.kept == columns.kept == 1:
            raise WanxError(
                "not enough memory is left for even the smallest tile of the VAE; "
                "end other programs, or choose a smaller size"
            )
        if rows.kept >= columns.kept:
            upper, lower = _halves(rows, self.height, self.border)
            return Tile(upper, columns), Tile(lower, columns)
        left, right = _halves(columns, self.width, self.border)
        return Tile(rows, left), Tile(rows, right)


def whole(height: int, width: int) -> Tiling:
    """One tile."""
    tile = Tile(Span(0, height, 0, height), Span(0, width, 0, width))
    return Tiling(height, width, (tile,))


def plan_tiles(height: int, width: int, border: int, area: int) -> Tiling:
    """Cover a frame with the least computation.

    Args:
        height: of the frame, in latent rows.
        width: of the frame, in latent columns.
        border: latent rows and columns around a tile that it depends on.
        area: most places that a tile may have, its border included.

    Raises:
        UsageError: not even the smallest tiles fit; see :func:`smallest_area`.
    """
    best: Tiling | None = None
    for rows in range(1, _most_parts(height, border) + 1):
        spans = list(_split(height, rows, border))
        tallest = max(span.outer for span in spans)
        # As few columns as fit: more of them recompute more.
        for columns in range(1, _most_parts(width, border) + 1):
            across = list(_split(width, columns, border))
            if tallest * max(span.outer for span in across) <= area:
                tiles = tuple(Tile(row, column) for row in spans for column in across)
                tiling = Tiling(height, width, tiles, border)
                if best is None or tiling.overhead < best.overhead:
                    best = tiling
                break
        if best is not None and best.overhead <= sum(s.outer for s in spans) / height:
            break  # more rows recompute more than the best does altogether
    if best is None:
        raise UsageError(
            f"a tile of a {height}x{width} latent has at least "
            f"{smallest_area(height, width, border)} places with its border, and {area} fit; "
            "raise the budget"
        )
    return best


def smallest_area(height: int, width: int, border: int) -> int:
    """Places of the largest tile where tiles are as small as they may be.

    They keep as much as a border of theirs is wide: smaller ones recompute ever more.
    """
    rows, columns = (
        min(
            max(span.outer for span in _split(side, parts, border))
            for parts in range(1, _most_parts(side, border) + 1)
        )
        for side in (height, width)
    )
    return rows * columns


def _most_parts(length: int, border: int) -> int:
    return max(1, length // max(border, 1))


def _split(length: int, parts: int, border: int) -> Iterator[Span]:
    """Cut a side into parts that differ by one at most."""
    for part in range(parts):
        start, stop = length * part // parts, length * (part + 1) // parts
        yield _span(start, stop, length, border)


def _halves(span: Span, length: int, border: int) -> tuple[Span, Span]:
    middle = (span.start + span.stop) // 2
    return (
        _span(span.start, middle, length, border),
        _span(middle, span.stop, length, border),
    )


def _span(start: int, stop: int, length: int, border: int) -> Span:
    """Rows or columns that are kept, with the border that the frame has around them."""
    return Span(start, stop, max(start - border, 0), min(stop + border, length))
