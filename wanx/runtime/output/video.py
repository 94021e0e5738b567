"""Writer of a video or an image while its frames are being decoded: all of it or nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wanx.errors import UsageError, WanxError
from wanx.runtime.output.checks import resolve_output
from wanx.runtime.output.encoding import MediaFile, MediaOptions, open_media
from wanx.runtime.output.provenance import to_comment
from wanx.runtime.output.temporary import create_temporary, find_leftovers


class VideoWriter:
    """Writes frames to ``path`` as they come; the extension chooses the format.

    ``.mp4`` is H.264 and ``.webm`` is VP9, both 4:2:0; ``.gif`` has one palette of 256 colours per
    frame; ``.png`` takes exactly one frame. A context manager: frames go to a hidden file in the
    same folder, which takes the final name only when everything is on disk. After an error or an
    interrupt that file is gone, and whatever had the final name before is untouched.

    Args:
        path: Where to write; ``wanx.runtime.output.checks.check_output`` lists what is refused.
        width: Pixels; even for ``.mp4`` and ``.webm``.
        height: Pixels; even for ``.mp4`` and ``.webm``.
        fps: Frames per second, 1 to 120, for ``.gif`` at most 50.
        quality: 0 to 10, the scale of imageio: crf = (1 - quality / 10) of the codec's range, so 8
            is crf 10 for H.264 and 12 for VP9. Without effect on ``.gif`` and ``.png``.
        metadata: Stored in the file for ``read_metadata``.

    Raises:
        UsageError: An argument is out of range, or a second frame arrives for a ``.png``.
        WanxError: The disk is full or failing, or no frame was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: int = 16,
        quality: float = 8,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path = resolve_output(path)
        self._options = MediaOptions(
            suffix=self._path.suffix.lower(),
            width=width,
            height=height,
            fps=fps,
            quality=quality,
            comment=to_comment(metadata or {}),
        )
        self._temporary: Path | None = None
        self._lock: int | None = None
        self._file: MediaFile | None = None
        self._frames = 0

    def __enter__(self) -> Self:
        find_leftovers(self._path.parent, remove=True)
        try:
            with self._errors():
                self._temporary, self._lock = create_temporary(self._path.parent)
                self._file = open_media(self._temporary, self._options)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Encode the next frames, uint8 [n, height, width, 3] in RGB; none of them is kept."""
        size = (self._options.height, self._options.width, 3)
        if frames.dtype != np.uint8 or frames.shape[1:] != size:
            raise UsageError(
                f"frames must be uint8 [n, {', '.join(map(str, size))}], "
                f"not {frames.dtype} {list(frames.shape)}"
            )
        assert self._file is not None
        for frame in frames:
            if self._options.suffix == ".png" and self._frames:
                raise UsageError(f"{self._path} can hold one frame only; use .mp4, .webm or .gif")
            with self._errors():
                self._file.write(np.ascontiguousarray(frame))
            self._frames += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        assert self._temporary is not None
        try:
            if kind is None:
                if self._frames == 0:
                    raise WanxError(f"no frame was decoded, so {self._path} was not written")
                with self._errors():
                    self._file.finish()
                    with open(self._temporary, "r+b") as stream:
                        os.fsync(stream.fileno())
                    os.replace(self._temporary, self._path)
        finally:
            try:
                self._file.close()
            finally:
                self._discard()

    def _discard(self) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from av import FFmpegError

        try:
            yield
        except (OSError, FFmpegError) as error:
            raise WanxError(
                f"cannot write {self._path}: {error.strerror or error}; nothing was left behind, "
                f"free some space or choose another folder with -o"
            ) from error
