"""Order in which the VAE's parts see a clip: its first chunk, then the others, with state between.

A chunk is a latent frame, and the frames of the video that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from wanx.runtime.sessions.base import OpenSession, Session, State
from wanx.runtime.vae.tiles import Tile, Tiling


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a part.

    Attributes:
        clip: number of the clip.
        tile: of its frames.
        index: of the chunk in it.
        session: of the part, for the first chunk of a clip or for a later one.
        state: that the part keeps of this tile of this clip.
        ends_frame: whether the frames of this chunk are whole after it.
    """

    clip: int
    tile: Tile
    index: int
    session: Session
    state: State
    ends_frame: bool


def calls(
    open_session: OpenSession,
    part: str,
    lengths: Sequence[int],
    tiling: Tiling,
    fits: Callable[[Tile], bool] = lambda tile: True,
) -> Iterator[Call]:
    """Calls of a part for every chunk of every tile of clips.

    The state of one tile is held at a time, with both graphs of the part loaded. Without tiles,
    one graph is loaded at a time, and the state of all clips is held.

    Args:
        open_session: gives a component as a context manager, which frees it.
        part: such as ``vae_decoder_up``.
        lengths: chunks of each clip.
        tiling: of the frames.
        fits: asked before each tile but the first of a clip: one that does not is cut in two.

    Raises:
        WanxError: a tile that does not fit has one place.
    """
    whole, states = len(tiling.tiles) == 1, dict[tuple[int, Tile], State]()
    with ExitStack() as stack:
        opened: dict[str, Session] = {}
        steps = _whole(lengths, tiling.tiles[0]) if whole else _tiled(lengths, tiling, fits)
        for clip, tile, index, last in steps:
            name = f"{part}_rest" if index else f"{part}_first"
            if name not in opened:
                if whole:
                    opened.clear()
                    stack.close()
                opened[name] = stack.enter_context(open_session(name))
            state = states.setdefault((clip, tile), {})
            yield Call(
                clip=clip, tile=tile, index=index, session=opened[name], state=state,
                ends_frame=last,
            )  # fmt: skip
            if index == lengths[clip] - 1:
                states.pop((clip, tile)).clear()  # whoever still holds it


_Step = tuple[int, Tile, int, bool]  # clip, tile, chunk, and whether the tile is the last


def _whole(lengths: Sequence[int], tile: Tile) -> Iterator[_Step]:
    for clip in range(len(lengths)):
        yield clip, tile, 0, True
    for clip, length in enumerate(lengths):
        yield from ((clip, tile, index, True) for index in range(1, length))


def _tiled(lengths: Sequence[int], tiling: Tiling, fits: Callable[[Tile], bool]) -> Iterator[_Step]:
    for clip, length in enumerate(lengths):
        left, first = [*reversed(tiling.tiles)], True
        while left:
            tile = left.pop()
            if not first and not fits(tile):
                left += reversed(tiling.cut(tile))
                continue
            first = False
            yield from ((clip, tile, index, not left) for index in range(length))
