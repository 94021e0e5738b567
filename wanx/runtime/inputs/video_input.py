"""Reader of videos from anywhere, with caps and without trust in their names."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from wanx.errors import CorruptInputError, UsageError
from wanx.runtime.inputs.budget import Budget
from wanx.runtime.inputs.container_ends import gif_end, matroska_end, mov_end
from wanx.runtime.inputs.image import MAX_PIXELS
from wanx.runtime.inputs.resize import cover

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

MAX_FRAMES = 10_000
_DEFAULT_RATE = Fraction(25)
_DEGREE = math.tan(math.radians(1))


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoInput:
    """A video that has been decoded once from beginning to end, so its frames are known to exist.

    Attributes:
        path: The absolute path.
        width: Pixels of the first frame as it is shown: square, upright, unmirrored.
        height: Likewise.
        times: float64 [frames, 2], the seconds from the start of the video at which each frame
            begins and ends. A frame ends where the next begins, the last one after 1 / average
            rate.
    """

    path: Path
    width: int
    height: int
    times: NDArray[np.float64]

    def read(self, ids: Sequence[int], height: int, width: int) -> NDArray[np.uint8]:
        """Decode some frames, each scaled to cover ``height`` x ``width`` and cropped around it.

        Args:
            ids: Numbers of frames, from 0, in any order; one may come several times.
            height: Pixels.
            width: Pixels.

        Returns:
            uint8 [len(ids), height, width, 3] in RGB.

        Raises:
            UsageError: There is no such frame, or the file is gone.
            CorruptInputError: The file has changed since it was opened.
        """
        positions: dict[int, list[int]] = {}
        for position, number in enumerate(ids):
            if not 0 <= number < len(self.times):
                raise UsageError(f"{self.path} has {len(self.times)} frames, so none is {number}")
            positions.setdefault(number, []).append(position)
        pixels = np.empty((len(ids), height, width, 3), dtype=np.uint8)
        with _open(self.path) as (container, stream):
            for number, frame in enumerate(_decode(self.path, container, stream)):
                if number in positions:
                    pixels[positions.pop(number)] = _fit(frame, stream, height, width)
                if not positions:
                    return pixels
        raise CorruptInputError(f"{self.path} has changed while it was read; run again")


def open_video(path: str | os.PathLike[str]) -> VideoInput:
    """Look at every frame of a video file.

    mp4, mov, webm, mkv, avi and gif are told apart by their first bytes, never by their name, so
    that ``concat:…`` or ``http:…`` are plain files and playlists are refused. Frames are turned by
    multiples of 90° and mirrored as the file's display matrix says, and non-square pixels made
    square by scaling the rows of the stored frame; other angles are ignored. Audio is ignored.

    Raises:
        UsageError: There is no such regular file, a frame has more than ``MAX_PIXELS`` pixels,
            there are more than ``MAX_FRAMES`` frames, or decoding costs more than the ``Budget``.
        CorruptInputError: The file is something else, is damaged or truncated, or has no frames.
    """
    try:
        target = Path(path).absolute()
        if not stat.S_ISREG(target.stat().st_mode):  # opening a pipe would hang
            raise UsageError(f"{path} is not a regular file; give a video file")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"the video {path} does not exist; check its name") from None
    except (OSError, ValueError) as error:  # no permission; too long, a NUL or half a surrogate
        raise UsageError(f"the video {str(path)!r} cannot be opened ({error}); check it") from None
    starts: list[float | None] = []
    sides = (0, 0)
    with _open(target) as (container, stream):
        _check_count(target, stream.frames)
        for frame in _decode(target, container, stream):
            if not starts:
                shown = max(1, round(frame.width * _pixel_aspect(stream)))
                _check_size(target, shown, frame.height)
                is_transposed, *_ = _orientation(frame)
                sides = (frame.height, shown) if is_transposed else (shown, frame.height)
            starts.append(frame.time)
            _check_count(target, len(starts))
        rate = stream.average_rate or stream.guessed_rate or _DEFAULT_RATE
    if not starts:
        raise _damaged(target, "it has no frames")
    times = _times(np.array(starts, dtype=np.float64), float(rate))
    return VideoInput(path=target, width=sides[0], height=sides[1], times=times)


def _times(starts: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Begin and end of each frame; evenly spaced if the file gives times out of order or none."""
    if np.isfinite(starts).all() and (np.diff(starts) >= 0).all():
        starts = starts - starts[0]
    else:
        starts = np.arange(len(starts)) / rate
    return np.stack([starts, np.append(starts[1:], starts[-1] + 1 / rate)], axis=1)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the file by what it holds; FFmpeg errors in the body become ``CorruptInputError``."""
    import av
    from av.stream import Disposition

    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    # FFmpeg gets the open file and a named demuxer: it never sees a path that it could interpret.
    try:
        with (
            file,
            av.open(file, "r", format=_demuxer(path, file), metadata_errors="replace") as container,
        ):
            streams = container.streams.video
            films = [s for s in streams if not s.disposition & Disposition.attached_pic]
            if not films:
                raise CorruptInputError(f"{path} has no video stream; give a file that has one")
            stream = films[0]
            if stream.codec_context is None:
                raise CorruptInputError(f"{path} has an unknown codec; convert it to H.264 in mp4")
            _check_size(path, stream.width, stream.height)
            # Frames may grow in mid-stream: decoders pad, hence twice the cap that frames pass.
            stream.codec_context.options = {"max_pixels": str(2 * MAX_PIXELS)}
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise _damaged(path, error.strerror or str(error)) from None


def _decode(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Frames in the order in which they are shown."""
    budget = Budget(path)
    for packet in container.demux(stream):
        with budget.seconds():
            frames = packet.decode()
        for frame in frames:
            if frame.is_corrupt:
                raise _damaged(path, "a frame is damaged")
            _check_size(path, frame.width, frame.height)
            budget.add_pixels(frame.width * frame.height)
            yield frame
        if packet.is_corrupt:
            raise _damaged(path, "it ends inside a frame")


def _fit(frame: VideoFrame, stream: VideoStream, height: int, width: int) -> NDArray[np.uint8]:
    """RGB pixels, uint8 [height, width, 3], oriented as the file asks, scaled and cropped."""
    pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    aspect = _pixel_aspect(stream)
    is_transposed, flips_rows, flips_columns = _orientation(frame)
    if is_transposed:
        pixels, aspect = pixels.swapaxes(0, 1), 1 / aspect
    pixels = pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]
    return cover(np.ascontiguousarray(pixels), height, width, pixel_aspect=aspect)


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Read whether to transpose a frame, and then to reverse its rows and its columns.

    The matrix of ISO 14496-12, [a b u, c d v, x y w], maps (x, y), y down, to (ax + cy, bx + dy).
    One that is more than a degree off the axes is ignored.
    """
    from av.sidedata.sidedata import SideDataContainer, Type

    side_data = cast("SideDataContainer", frame.side_data)  # where PyAV's stub has a dictionary
    if Type.DISPLAYMATRIX not in side_data:
        return False, False, False
    matrix = bytes(side_data[Type.DISPLAYMATRIX])
    a, b, _, c, d, *_ = (int(value) for value in np.frombuffer(matrix, np.int32))
    along, across = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= _DEGREE * along:
        return False, d < 0, a < 0
    if max(abs(a), abs(d)) <= _DEGREE * across:
        return True, b < 0, c < 0
    return False, False, False


def _pixel_aspect(stream: VideoStream) -> float:
    """Width of a stored pixel by its height; 1 where the file does not say."""
    return float(stream.sample_aspect_ratio or 1)


def _damaged(path: Path, reason: str) -> CorruptInputError:
    return CorruptInputError(
        f"{path} cannot be read as a video: {reason}; download or convert it again"
    )


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height == 0:
        raise _damaged(path, f"its frames are {width}x{height}")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{path} has frames of {width}x{height}, more than {MAX_PIXELS} pixels; scale it down"
        )


def _check_count(path: Path, frames: int) -> None:
    if frames > MAX_FRAMES:
        raise UsageError(
            f"{path} has at least {frames} frames, more than {MAX_FRAMES}; cut it shorter"
        )


def _demuxer(path: Path, file: BufferedReader) -> str:
    """Name of FFmpeg's demuxer for this file, which is checked to reach to the end that it claims.

    FFmpeg itself plays webm, mkv and gif without complaint as far as they go.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(4096)
    if head[:6] in (b"GIF87a", b"GIF89a") and len(head) > 10:
        # A larger GIF than FFmpeg can handle would come out as 0x0.
        _check_size(path, *(int.from_bytes(head[at : at + 2], "little") for at in (6, 8)))
        name, end = "gif", gif_end(file, head)
    elif head.startswith(b"\x1a\x45\xdf\xa3"):
        name, end = "matroska", matroska_end(head)
    elif head[:4] == b"RIFF" and head[8:11] == b"AVI":
        name, end = "avi", 8 + int.from_bytes(head[4:8], "little")
    elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        name, end = "mov", mov_end(file, size)
    else:
        reason = "it is neither mp4, mov, webm, mkv, avi nor gif" if size else "it is empty"
        raise _damaged(path, reason)
    if end > size:
        raise _damaged(path, f"{size} bytes are there of at least {end}")
    file.seek(0)
    return name
