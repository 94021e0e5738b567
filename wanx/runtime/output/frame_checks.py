"""Checks of decoded frames for the ways in which a broken model fails silently."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wanx.errors import WanxError

BLACK_LEVEL = 2
FLAT_STD = 0.5


def frames_to_uint8(frames: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Turn decoded frames into pixels: clamp to [-1, 1], scale to 0..255, round to nearest.

    The order of the operations is that of the published pipelines, so that equal float frames give
    equal bytes.

    Args:
        frames: Finite values, [n, H, W, 3], or [3, n, H, W] where the last axis is not 3.

    Returns:
        [n, H, W, 3].
    """
    if frames.shape[-1] != 3:
        frames = np.moveaxis(frames, 0, -1)
    unit = np.clip(frames * 0.5 + 0.5, 0, 1)
    return np.ascontiguousarray(np.rint(unit * 255).astype(np.uint8))


class FrameCheck:
    """Checks a video batch by batch; holds one frame and a few sums.

    Black means that no pixel exceeds ``BLACK_LEVEL`` of 255. Flat means that over the whole video
    every channel deviates from its mean by less than ``FLAT_STD`` of 255. Frozen means that there
    are several frames and all are equal to the bit.
    """

    def __init__(self) -> None:
        self._frames = 0
        self._pixels = 0
        self._peak = 0
        self._sum = np.zeros(3, dtype=np.int64)
        self._squares = np.zeros(3, dtype=np.int64)
        self._last: NDArray[np.uint8] | None = None
        self._moved = False

    @staticmethod
    def convert(decoded: NDArray[np.floating], first: int) -> NDArray[np.uint8]:
        """Check decoded frames, or parts of them, and turn them into pixels.

        Args:
            decoded: as for :func:`frames_to_uint8`.
            first: number of the first of them.

        Raises:
            WanxError: A frame holds NaN or infinity.
        """
        axis = 0 if decoded.shape[-1] == 3 else 1
        finite = np.isfinite(decoded).all(axis=tuple(i for i in range(4) if i != axis))
        if not finite.all():
            number = int(np.argmin(finite))
            kind = "NaN" if np.isnan(decoded.take(number, axis=axis)).any() else "infinity"
            raise WanxError(
                f"the VAE produced {kind} at frame {first + number}; check the bundle with "
                f"`wanx verify` or export it at a higher precision"
            )
        return frames_to_uint8(decoded)

    def update(self, pixels: NDArray[np.uint8]) -> None:
        """Take note of the next frames, [n, H, W, 3]."""
        for frame in pixels:
            self._frames += 1
            self._pixels += frame.shape[0] * frame.shape[1]
            self._peak = max(self._peak, int(frame.max()))
            self._sum += frame.sum(axis=(0, 1), dtype=np.int64)
            self._squares += np.square(frame, dtype=np.uint16).sum(axis=(0, 1), dtype=np.int64)
            if self._last is not None and not self._moved:
                self._moved = not np.array_equal(frame, self._last)
            self._last = None if self._moved else frame.copy()

    def finish(self) -> None:
        """Judge the whole video.

        Raises:
            WanxError: The video has no frames, or is black, flat or frozen.
        """
        if self._frames == 0:
            raise WanxError("the VAE produced no frames; check the bundle with `wanx verify`")
        mean = self._sum / self._pixels
        std = float(np.sqrt(np.maximum(self._squares / self._pixels - mean**2, 0)).max())
        if self._peak <= BLACK_LEVEL:
            fault = f"black: the brightest pixel is {self._peak} of 255"
        elif std < FLAT_STD:
            fault = f"one flat colour: its deviation is {std:.2f} of 255"
        elif self._frames > 1 and not self._moved:
            fault = f"frozen: all {self._frames} frames are identical"
        else:
            return
        raise WanxError(
            f"the video is {fault}; try another seed, and check the bundle with `wanx verify`"
        )
