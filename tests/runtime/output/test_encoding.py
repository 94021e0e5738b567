"""What players see: decoded by FFmpeg or Pillow, compared with what went in."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from wanx.errors import UsageError
from wanx.runtime.output.video import VideoWriter

VIDEO = [".mp4", ".webm"]


def smooth_scene(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """Moving colour gradients, [frames, height, width, 3]."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width].astype(np.float64)
    red = 128 + 100 * np.sin(x / 30 + t / 5)
    green = 128 + 100 * np.cos(y / 25 + t / 7)
    blue = 60 + 2 * t
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


def write(path: Path, scene: NDArray[np.uint8], **options: int) -> None:
    with VideoWriter(path, scene.shape[2], scene.shape[1], **options) as writer:
        writer.write(scene)


def decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def decode_with_pillow(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.stack([np.array(f.convert("RGB")) for f in ImageSequence.Iterator(image)])


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("suffix", VIDEO)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 48, 80), (17, 64, 64)])
def test_video_survives(tmp_path: Path, suffix: str, frames: int, height: int, width: int) -> None:
    scene = smooth_scene(frames, height, width)
    write(tmp_path / f"v{suffix}", scene)
    decoded = decode(tmp_path / f"v{suffix}")
    assert decoded.shape == scene.shape
    assert psnr(decoded, scene) > 35


@pytest.mark.parametrize("frames", [1, 17])
def test_gif_survives(tmp_path: Path, frames: int) -> None:
    scene = smooth_scene(frames, 48, 80)
    write(tmp_path / "v.gif", scene)
    assert psnr(decode(tmp_path / "v.gif"), scene) > 33
    assert psnr(decode_with_pillow(tmp_path / "v.gif"), scene) > 33


def test_png_is_lossless(tmp_path: Path) -> None:
    scene = np.random.default_rng(0).integers(0, 256, (1, 33, 47, 3), dtype=np.uint8)
    write(tmp_path / "v.png", scene)
    assert np.array_equal(decode_with_pillow(tmp_path / "v.png"), scene)


@pytest.mark.parametrize("suffix", [*VIDEO, ".gif"])
@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 30, 120)]
)
def test_colours_come_back(tmp_path: Path, suffix: str, colour: tuple[int, int, int]) -> None:
    scene = np.full((3, 32, 32, 3), colour, dtype=np.uint8)
    write(tmp_path / f"v{suffix}", scene)
    assert np.abs(decode(tmp_path / f"v{suffix}").astype(int) - colour).max() <= 3


@pytest.mark.parametrize("suffix", VIDEO)
def test_luma_is_bt709_and_tagged_so(tmp_path: Path, suffix: str) -> None:
    scene = np.full((3, 32, 32, 3), (255, 0, 0), dtype=np.uint8)
    write(tmp_path / f"v{suffix}", scene)
    with av.open(str(tmp_path / f"v{suffix}")) as container:
        codec = container.streams.video[0].codec_context
        assert codec.pix_fmt == "yuv420p"
        assert (codec.color_primaries, codec.color_trc, codec.colorspace) == (1, 1, 1)
        assert codec.color_range == 1
        luma = next(container.decode(video=0)).to_ndarray()[:32]
    # BT.709: Y = 16 + 219 · 0.2126 for pure red; BT.601 would give 16 + 219 · 0.299 = 81.
    assert np.abs(luma.astype(int) - (16 + 219 * 0.2126)).max() < 2


@pytest.mark.parametrize("suffix", VIDEO)
@pytest.mark.parametrize("fps", [1, 16, 24, 120])
def test_frame_times(tmp_path: Path, suffix: str, fps: int) -> None:
    write(tmp_path / f"v{suffix}", smooth_scene(9, 16, 16), fps=fps)
    with av.open(str(tmp_path / f"v{suffix}")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert np.allclose(times, np.arange(9) / fps, atol=1e-3)


@pytest.mark.parametrize("fps", [1, 16, 24, 50])
def test_gif_frame_times_do_not_drift(tmp_path: Path, fps: int) -> None:
    write(tmp_path / "v.gif", smooth_scene(33, 16, 16), fps=fps)
    with Image.open(tmp_path / "v.gif") as image:
        assert image.info["loop"] == 0
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    ends = np.cumsum(durations)[:-1]
    assert np.abs(ends - 1000 * np.arange(1, 33) / fps).max() <= 10


def test_mp4_can_start_before_it_is_complete(tmp_path: Path) -> None:
    write(tmp_path / "v.mp4", smooth_scene(5, 32, 32))
    data = (tmp_path / "v.mp4").read_bytes()
    boxes, at = [], 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        boxes.append(kind)
        at += size
    assert boxes.index(b"moov") < boxes.index(b"mdat")


@pytest.mark.parametrize("suffix", VIDEO)
def test_quality_trades_size_for_fidelity(tmp_path: Path, suffix: str) -> None:
    scene = smooth_scene(5, 64, 64)
    sizes, fidelities = [], []
    for quality in (0, 5, 8, 10):
        path = tmp_path / f"{quality}{suffix}"
        write(path, scene, quality=quality)
        sizes.append(path.stat().st_size)
        fidelities.append(psnr(decode(path), scene))
    assert sizes == sorted(sizes)
    assert fidelities == sorted(fidelities)
    assert fidelities[-1] > fidelities[0] + 3


def test_quality_8_is_crf_10_as_in_imageio(tmp_path: Path) -> None:
    write(tmp_path / "v.mp4", smooth_scene(2, 16, 16))
    assert b"crf=10.0" in (tmp_path / "v.mp4").read_bytes()


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".mp4", {"width": 33}, "even width and height, not 33x32"),
        (".webm", {"height": 31}, "even width and height, not 32x31"),
        (".mp4", {"fps": 0}, "fps 0 is outside 1 to 120"),
        (".gif", {"fps": 51}, "fps 51 is outside 1 to 50"),
        (".mp4", {"quality": 11}, "quality 11 is outside 0 to 10"),
        (".png", {"quality": -1}, "quality -1 is outside 0 to 10"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, suffix: str, change: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        VideoWriter(tmp_path / f"v{suffix}", **{"width": 32, "height": 32} | change)
    assert not list(tmp_path.iterdir())


def test_odd_sizes_fit_gif_and_png(tmp_path: Path) -> None:
    scene = smooth_scene(1, 15, 17)
    for name in ("v.gif", "v.png"):
        write(tmp_path / name, scene)
        assert decode_with_pillow(tmp_path / name).shape == scene.shape
