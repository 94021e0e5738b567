"""Encoding of frames into the bytes of a file: FFmpeg for videos, Pillow for images.

Colours are tagged as what they are, BT.709 primaries, transfer and matrix in limited range, so that
players do not guess.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from wanx.errors import UsageError
from wanx.runtime.output.provenance import PNG_KEYWORD, insert_gif_comment

if TYPE_CHECKING:
    from av.filter import Graph

_BT709 = 1
_LIMITED_RANGE = 1
_YUV = (
    ("scale", "out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"),
    ("format", "yuv420p"),
)


@dataclass(frozen=True, kw_only=True)
class _Coding:
    """Settings of FFmpeg for one kind of file; ``worst_crf`` is the codec's coarsest quality."""

    container: str
    codec: str
    pixels: str
    max_fps: int = 120
    worst_crf: int | None = None
    codec_options: Mapping[str, str] = field(default_factory=dict)
    container_options: Mapping[str, str] = field(default_factory=dict)


_CODINGS = {
    ".mp4": _Coding(
        container="mp4",
        codec="libx264",
        pixels="yuv420p",
        worst_crf=51,
        container_options={"movflags": "+faststart"},
    ),
    ".webm": _Coding(
        container="webm",
        codec="libvpx-vp9",
        pixels="yuv420p",
        worst_crf=63,
        codec_options={"b:v": "0", "row-mt": "1", "cpu-used": "4"},
    ),
    ".gif": _Coding(container="gif", codec="gif", pixels="pal8", max_fps=50),
}


class MediaFile(Protocol):
    """A file that is being written."""

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Encode the next frame, uint8 [height, width, 3] in RGB."""

    def finish(self) -> None:
        """Write what is still buffered and close the file."""

    def close(self) -> None:
        """Close the file in whatever state it is; never fails."""


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """Format, size and rate of a file to write; see ``wanx.runtime.output.video.VideoWriter``.

    Raises:
        UsageError: A value is outside what the format can hold.
    """

    suffix: str
    width: int
    height: int
    fps: int
    quality: float
    comment: str

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 10:
            raise UsageError(f"quality {self.quality} is outside 0 to 10")
        coding = _CODINGS.get(self.suffix)
        if coding is None:
            return
        if not 1 <= self.fps <= coding.max_fps:
            raise UsageError(
                f"fps {self.fps} is outside 1 to {coding.max_fps}, the range of {self.suffix}"
            )
        if coding.pixels == "yuv420p" and (self.width % 2 or self.height % 2):
            raise UsageError(
                f"{self.suffix} needs an even width and height, not {self.width}x{self.height}"
            )


def open_media(path: Path, options: MediaOptions) -> MediaFile:
    """Create the file; ``path`` must be absolute, its own extension does not matter."""
    if options.suffix == ".png":
        return _ImageFile(path, options.comment)
    return _VideoFile(path, options)


class _VideoFile:
    """An FFmpeg container with one video stream."""

    def __init__(self, path: Path, options: MediaOptions) -> None:
        import av

        coding = _CODINGS[options.suffix]
        codec_options = dict(coding.codec_options)
        if coding.worst_crf is not None:
            codec_options["crf"] = str(int((1 - options.quality / 10) * coding.worst_crf))
        self._path = path
        self._options = options
        self._time_base = Fraction(1, options.fps)
        self._frames = 0
        self._container = av.open(
            str(path),
            "w",
            format=coding.container,
            container_options=dict(coding.container_options),
        )
        if options.comment:
            self._container.metadata["comment"] = options.comment
        stream = self._container.add_stream(coding.codec, rate=options.fps, options=codec_options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = options.width, options.height
        stream.pix_fmt = coding.pixels
        if coding.pixels == "yuv420p":
            codec = stream.codec_context
            codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
            codec.color_range = _LIMITED_RANGE
        self._stream = stream
        self._graph = _conversion(coding.pixels, options, self._time_base)
        self._container.start_encoding()

    def write(self, frame: NDArray[np.uint8]) -> None:
        import av

        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts = self._frames
        picture.time_base = self._time_base
        self._graph.vpush(picture)
        self._container.mux(self._stream.encode(self._graph.vpull()))
        self._frames += 1

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        if self._options.suffix == ".gif" and self._options.comment:
            insert_gif_comment(self._path, self._options.comment)

    def close(self) -> None:
        # The file is about to be deleted or is already published: what its trailer says is moot.
        with contextlib.suppress(Exception):
            self._container.close()


def _conversion(pixels: str, options: MediaOptions, time_base: Fraction) -> Graph:
    """Build the filter graph from RGB to the pixels of a codec: one frame in, one frame out."""
    import av
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=options.width,
        height=options.height,
        format=av.VideoFormat("rgb24"),
        time_base=time_base,
    )
    sink = graph.add("buffersink")
    if pixels == "yuv420p":
        graph.link_nodes(source, *(graph.add(*step) for step in _YUV), sink)
    else:
        split = graph.add("split")
        palette = graph.add("palettegen", "stats_mode=single")
        use = graph.add("paletteuse", "new=1")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
    graph.configure()
    return graph


class _ImageFile:
    """One PNG."""

    def __init__(self, path: Path, comment: str) -> None:
        self._stream: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by finish and close
        self._comment = comment

    def write(self, frame: NDArray[np.uint8]) -> None:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        if self._comment:
            info.add_itxt(PNG_KEYWORD, self._comment)
        Image.fromarray(frame).save(self._stream, format="png", pnginfo=info)

    def finish(self) -> None:
        self._stream.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
