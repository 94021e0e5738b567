"""Which frames come back, when they are shown, and what is refused before it does harm."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.runtime.inputs import budget, video_input
from wanx.runtime.inputs.video_input import open_video

NOISE = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
# Codec, pixels and options; the first four are lossless.
CODINGS: dict[str, tuple[str, str, dict[str, str]]] = {
    ".mkv": ("ffv1", "bgr0", {}),
    ".avi": ("ffv1", "bgr0", {}),
    ".mp4": ("libx264rgb", "rgb24", {"qp": "0", "bf": "2"}),
    ".mov": ("libx264rgb", "rgb24", {"qp": "0", "x264-params": "b-pyramid=normal:bframes=3"}),
    ".m4v": ("libx264", "yuv444p", {"crf": "1"}),
    ".webm": ("libvpx-vp9", "yuv444p", {"lossless": "1", "cpu-used": "8"}),
    ".gif": ("gif", "rgb8", {}),
    "mjpeg": ("mjpeg", "yuvj444p", {}),
    "vp8": ("libvpx", "yuv420p", {"crf": "4", "b:v": "1M"}),
}
SUFFIXES = [name for name in CODINGS if name.startswith(".")]
LOSSLESS = [".mkv", ".avi", ".mp4", ".mov"]


def write(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    *,
    coding: str = "",
    times: Sequence[int] | None = None,
    sound: bool = False,
    **container_options: str,
) -> Path:
    """Encode RGB frames, at 16 fps or at ``times`` in milliseconds."""
    codec, pixels, options = CODINGS[coding or path.suffix]
    container = {"m4v": "mp4", "mkv": "matroska"}.get(path.suffix[1:], path.suffix[1:])
    with av.open(str(path), "w", format=container, container_options=container_options) as file:
        stream = file.add_stream(codec, rate=16, options=options)
        assert isinstance(stream, av.VideoStream)
        audio = file.add_stream("aac", rate=44_100, layout="mono") if sound else None
        if len(frames):
            stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, 16)
        file.start_encoding()
        if audio is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 44_100, 0
            file.mux([*audio.encode(silence), *audio.encode(None)])
        for number, pixels_of_frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of_frame, format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = stream.codec_context.time_base
            file.mux(stream.encode(frame.reformat(format=pixels)))
        if len(frames):
            file.mux(stream.encode(None))
    return path


def levels(count: int, height: int = 48, width: int = 64) -> list[NDArray[np.uint8]]:
    """Flat grey frames; their number is the level divided by 20, even after a lossy codec."""
    return [np.full((height, width, 3), 20 * number, dtype=np.uint8) for number in range(count)]


def numbers(pixels: NDArray[np.uint8]) -> list[float]:
    middle = pixels[:, 4:-4, 4:-4].mean(axis=(1, 2, 3), dtype=np.float64)
    return [round(float(level)) for level in middle / 20]


def refusal(path: str | Path, kind: type[WanxError]) -> str:
    with pytest.raises(WanxError) as caught:
        open_video(path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_wanted_frames_come_back(tmp_path: Path, suffix: str) -> None:
    video = open_video(write(tmp_path / f"v{suffix}", levels(12)))
    assert (video.width, video.height, len(video.times)) == (64, 48, 12)
    ids = [7, 0, 11, 7, 7, 3]
    pixels = video.read(ids, 48, 64)
    assert (pixels.shape, pixels.dtype) == ((6, 48, 64, 3), np.uint8)
    assert numbers(pixels) == ids
    assert numbers(video.read(range(12), 48, 64)) == list(range(12))
    assert video.read([], 16, 32).shape == (0, 16, 32, 3)


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize(("height", "width"), [(48, 64), (33, 47), (1, 1), (7, 100)])
def test_pixels_are_untouched_where_they_fit(
    tmp_path: Path, suffix: str, height: int, width: int
) -> None:
    scene = np.random.default_rng(1).integers(0, 256, (5, height, width, 3), dtype=np.uint8)
    video = open_video(write(tmp_path / f"v{suffix}", scene))
    assert (video.width, video.height) == (width, height)
    assert np.array_equal(video.read([4, 1], height, width), scene[[4, 1]])


def cover_by_torch(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    scale = max(width / frame.shape[1], height / frame.shape[0])
    size = (round(frame.shape[0] * scale), round(frame.shape[1] * scale))
    planes = torch.from_numpy(frame).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cropped = scaled[0, :, top : top + height, left : left + width]
    return cropped.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("height", "width"), [(48, 16), (16, 48), (33, 31), (96, 160), (160, 64)])
def test_frames_are_scaled_to_cover_and_cropped(tmp_path: Path, height: int, width: int) -> None:
    made = open_video(write(tmp_path / "v.mkv", NOISE)).read([2, 9], height, width)
    for pixels, number in zip(made, (2, 9), strict=True):
        expected = cover_by_torch(NOISE[number], height, width)
        assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_times_of_a_constant_rate(tmp_path: Path, suffix: str) -> None:
    times = open_video(write(tmp_path / f"v{suffix}", levels(9))).times
    precision = {".gif": 0.0051, ".webm": 6e-4, ".mkv": 6e-4}.get(suffix, 1e-9)
    assert (times.dtype, times.shape) == (np.float64, (9, 2))
    assert np.allclose(times[:, 0], np.arange(9) / 16, atol=precision)
    assert np.allclose(times[:, 1], np.arange(1, 10) / 16, atol=2 * precision)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov", ".webm"])
@pytest.mark.parametrize("start", [0, 5000])
def test_times_of_a_variable_rate(tmp_path: Path, suffix: str, start: int) -> None:
    shown = [0, 10, 30, 100, 110, 111, 200, 300, 1000, 1010, 1020, 1100]
    path = write(tmp_path / f"v{suffix}", levels(12), times=[start + time for time in shown])
    video = open_video(path)
    assert np.allclose(video.times[:, 0], np.array(shown) / 1000, atol=1e-9)
    assert np.array_equal(video.times[1:, 0], video.times[:-1, 1])
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    assert rate
    assert np.isclose(video.times[-1, 1], 1.1 + 1 / rate)
    assert numbers(video.read(range(12), 48, 64)) == list(range(12))


def remux(target: Path, parts: Sequence[Path], times: Sequence[int]) -> Path:
    """Join videos of one codec, whose packets get new times of presentation in milliseconds."""
    with av.open(str(target), "w") as file:
        count = 0
        for part in parts:
            with av.open(str(part)) as source:
                if not count:
                    stream = file.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.time_base = Fraction(1, 1000)
                        packet.pts, packet.dts, packet.stream = times[count], count, stream
                        file.mux(packet)
                        count += 1
    assert count == len(times)
    return target


def test_times_out_of_order_are_replaced(tmp_path: Path) -> None:
    part = write(tmp_path / "part.mkv", levels(5))
    given = [100, 50, 300, 200, 400]
    path = remux(tmp_path / "v.mkv", [part], given)
    with av.open(str(path)) as container:
        assert [frame.pts for frame in container.decode(video=0)] == given
    video = open_video(path)
    assert np.allclose(video.times[:, 0], video.times[0, 1] * np.arange(5))
    assert np.allclose(np.diff(video.times, axis=1), video.times[0, 1])
    assert video.times[0, 1] > 0
    assert numbers(video.read(range(5), 48, 64)) == list(range(5))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_frame(tmp_path: Path, suffix: str) -> None:
    video = open_video(write(tmp_path / f"v{suffix}", levels(2)[1:]))
    assert len(video.times) == 1
    assert video.times[0, 0] == 0 < video.times[0, 1]
    assert numbers(video.read([0, 0], 48, 64)) == [1, 1]


def with_matrix(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Change the display matrix of an mp4 or mov."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (round(value * 2**16) for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


# The matrix of ISO 14496-12 maps (x, y), y down, to (ax + cy, bx + dy).
@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
)
def test_rotation(tmp_path: Path, matrix: tuple[int, int, int, int], turns: int) -> None:
    video = open_video(with_matrix(write(tmp_path / "v.mp4", NOISE), matrix))
    expected = np.rot90(NOISE, turns, axes=(1, 2))
    assert (video.height, video.width) == expected.shape[1:3]
    assert np.array_equal(video.read([3], video.height, video.width), expected[3:4])


def mapped(frame: NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Every pixel where a matrix of -1, 0 and 1 puts it, moved so that it begins at (0, 0)."""
    a, b, c, d = matrix
    y, x = np.indices(frame.shape[:2])
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    image = np.zeros((rows.max() + 1, columns.max() + 1, 3), np.uint8)
    image[rows, columns] = frame
    return image


ORIENTATIONS = [
    (p, 0, 0, q) if straight else (0, p, q, 0)
    for straight in (True, False) for p in (1, -1) for q in (1, -1)
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("matrix", ORIENTATIONS)
@pytest.mark.fault("mirrored or turned video")
def test_every_orientation(tmp_path: Path, matrix: tuple[int, ...], suffix: str) -> None:
    video = open_video(with_matrix(write(tmp_path / f"v{suffix}", NOISE[:4]), matrix))
    expected = mapped(NOISE[3], matrix)
    assert (video.height, video.width) == expected.shape[:2]
    assert np.array_equal(video.read([3], video.height, video.width)[0], expected)


@pytest.mark.parametrize(("degrees", "is_turned"), [(89.5, True), (90.5, True), (60, False)])
def test_other_angles(tmp_path: Path, degrees: float, is_turned: bool) -> None:
    """A little off the axes is a rounding of the writer's; anything else stays as it is stored."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    video = open_video(with_matrix(write(tmp_path / "v.mp4", NOISE), (cosine, sine, -sine, cosine)))
    assert (video.width, video.height) == ((48, 64) if is_turned else (64, 48))


def with_pixel_aspect(path: Path, frames: Sequence[NDArray[np.uint8]], aspect: Fraction) -> Path:
    codec, pixels, options = CODINGS[path.suffix]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=16, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            shown = av.VideoFrame.from_ndarray(frame, format="rgb24")
            file.mux(stream.encode(shown.reformat(format=pixels)))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("matrix", [None, *ORIENTATIONS])
@pytest.mark.parametrize(
    ("aspect", "width"), [("2", 128), ("1/2", 32), ("16/15", 68), ("8/9", 57), ("1", 64)]
)
@pytest.mark.fault("mirrored or turned video")
def test_pixels_that_are_not_square(
    tmp_path: Path, aspect: str, width: int, matrix: tuple[int, ...] | None
) -> None:
    path = with_pixel_aspect(tmp_path / "v.mp4", NOISE[:3], Fraction(aspect))
    video = open_video(path if matrix is None else with_matrix(path, matrix))
    shown = np.array(Image.fromarray(NOISE[1]).resize((width, 48), Image.Resampling.BICUBIC))
    expected = mapped(shown, matrix or (1, 0, 0, 1))
    assert (video.height, video.width) == expected.shape[:2]
    pixels = video.read([1], video.height, video.width)[0]
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    # The middle is kept at any other size: a square of 16 pixels, and what covers it.
    cropped = video.read([1], 16, 16)[0].mean()
    assert abs(cropped - expected.mean()) < 12


@pytest.mark.parametrize("suffix", [".mov", ".m4v", ".gif"])
def test_pixel_aspects_of_other_containers(tmp_path: Path, suffix: str) -> None:
    path = with_pixel_aspect(tmp_path / f"v{suffix}", NOISE[:3], Fraction(4, 3))
    assert (open_video(path).width, open_video(path).height) == (85, 48)


def test_pixel_aspects_of_webm(tmp_path: Path) -> None:
    """They are the quotient of the size at which to show a frame and the one that it has."""
    path = write(tmp_path / "v.webm", levels(2))
    data = path.read_bytes()
    at = data.index(b"\x23\xe3\x83\x84")  # DefaultDuration of 8 bytes, before Video
    size = b"\xb0\x81\x40\xba\x81\x30"  # PixelWidth, PixelHeight
    assert data[at + 8 : at + 16] == b"\xe0\x86" + size
    shown = b"\xe0\x8e" + size + b"\x54\xb0\x81\x60" + b"\xec\x82\0\0"  # DisplayWidth, Void
    path.write_bytes(data[:at] + shown + data[at + 16 :])
    assert (open_video(path).width, open_video(path).height) == (96, 48)


def test_pixels_as_wide_as_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_input, "MAX_PIXELS", 64 * 48 * 10)
    path = with_pixel_aspect(tmp_path / "v.mp4", NOISE[:2], Fraction(20))
    assert "1280x48, more than" in refusal(path, UsageError)


def test_colours_are_those_that_the_file_names(tmp_path: Path) -> None:
    from wanx.runtime.output.video import VideoWriter

    scene = np.full((2, 32, 32, 3), (200, 30, 120), dtype=np.uint8)
    with VideoWriter(tmp_path / "v.mp4", 32, 32) as writer:  # BT.709 in limited range
        writer.write(scene)
    assert (
        np.abs(open_video(tmp_path / "v.mp4").read([1], 32, 32).astype(int) - scene[1:]).max() <= 3
    )


def test_audio_is_ignored(tmp_path: Path) -> None:
    video = open_video(write(tmp_path / "v.mp4", levels(5), sound=True))
    assert numbers(video.read(range(5), 48, 64)) == list(range(5))


def test_frames_may_change_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(48, 64), (80, 64)]
    parts = [write(tmp_path / f"{h}.avi", levels(2, h, w), coding="vp8") for h, w in sizes]
    video = open_video(remux(tmp_path / "v.mkv", parts, [10, 20, 30, 40]))
    assert (video.width, video.height, len(video.times)) == (64, 48, 4)
    assert numbers(video.read(range(4), 32, 32)) == [0, 1, 0, 1]
    monkeypatch.setattr(video_input, "MAX_PIXELS", 64 * 48)
    assert "64x80" in refusal(tmp_path / "v.mkv", UsageError)


def test_the_name_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = write(tmp_path / "v.webm", levels(3)).read_bytes()
    for name in ("v.mp4", "v", "v.txt", "-i", "%03d.mp4", "http:x", "concat:v|v.mp4", "pipe:0"):
        Path(name).write_bytes(whole)
        assert numbers(open_video(name).read([2], 48, 64)) == [2]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ffmpeg_gets_neither_a_name_nor_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    calls = []
    opened = av.open

    def spy(file: Any, *arguments: Any, **options: Any) -> Any:
        calls.append((file, options["format"]))
        return opened(file, *arguments, **options)

    path = write(tmp_path / f"v{suffix}", levels(2))
    monkeypatch.setattr(av, "open", spy)
    open_video(path).read([1], 16, 16)
    demuxer = {".mkv": "matroska", ".webm": "matroska", ".avi": "avi", ".gif": "gif"}
    assert [name for _, name in calls] == [demuxer.get(suffix, "mov")] * 2
    assert not any(isinstance(file, str | Path) for file, _ in calls)


def test_reading_goes_on_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "v.mkv", levels(3))
    monkeypatch.chdir(tmp_path)
    video = open_video("v.mkv")
    monkeypatch.chdir("/")
    assert numbers(video.read([2], 48, 64)) == [2]


@pytest.mark.parametrize("number", [-1, 3, 10**9])
def test_no_such_frame(tmp_path: Path, number: int) -> None:
    video = open_video(write(tmp_path / "v.mkv", levels(3)))
    with pytest.raises(UsageError, match=f"has 3 frames, so none is {number}"):
        video.read([0, number], 16, 16)


def test_a_file_that_changes(tmp_path: Path) -> None:
    video = open_video(write(tmp_path / "v.mkv", levels(5)))
    write(tmp_path / "v.mkv", levels(3))
    with pytest.raises(CorruptInputError, match="has changed"):
        video.read([4], 16, 16)
    video.path.unlink()
    with pytest.raises(UsageError, match=r"cannot read .*v\.mkv: No such file"):
        video.read([0], 16, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.mp4", "does not exist"),
        ("file/v.mp4", "does not exist"),
        ("", "is not a regular file"),
        (".", "is not a regular file"),
        ("http://localhost/v.mp4", "does not exist"),
        ("a\0b.mp4", "null"),
        ("\ud800.mp4", "cannot be opened"),
        ("n" * 300, "cannot be opened"),
    ],
)
def test_no_such_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert message in refusal(name, UsageError)


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "v.mp4")
    descriptor = os.open(tmp_path / "v.mp4", os.O_RDWR)
    os.write(descriptor, bytes(2**16))  # whoever reads it does not hang, so that the test fails
    assert "is not a regular file" in refusal(tmp_path / "v.mp4", UsageError)
    os.close(descriptor)


PLAYLISTS = {
    "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile secret.mp4\n",
    "dash": b"<?xml version='1.0'?><MPD><BaseURL>secret.mp4</BaseURL></MPD>",
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "text": b"not a video",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_something_else_under_the_name_of_a_video(tmp_path: Path, suffix: str, kind: str) -> None:
    write(tmp_path / "secret.mp4", levels(2))
    (tmp_path / f"v{suffix}").write_bytes(PLAYLISTS[kind])
    assert "it is neither mp4, mov," in refusal(tmp_path / f"v{suffix}", CorruptInputError)


@pytest.mark.parametrize("layout", [{}, {"movflags": "+faststart"}])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.fault("damaged image or video")
def test_truncated_files(tmp_path: Path, suffix: str, layout: dict[str, str]) -> None:
    whole = write(tmp_path / f"w{suffix}", NOISE[:5], **layout).read_bytes()
    path = tmp_path / f"v{suffix}"
    size = len(whole)
    for kept in sorted(
        {*range(0, size, size // 40), 1, 7, 8, 12, 16, 20, 40, size - 100, size - 1}
    ):
        path.write_bytes(whole[:kept])
        refusal(path, CorruptInputError)
    path.write_bytes(b"")
    assert "it is empty" in refusal(path, CorruptInputError)


@pytest.mark.parametrize(("coding", "reason"), [(".m4v", ""), (".mp4", "a frame is damaged")])
def test_a_hole_in_the_middle(tmp_path: Path, coding: str, reason: str) -> None:
    path = write(tmp_path / "v.mp4", NOISE, coding=coding)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(20_000)  # the whole of a frame, wherever it begins
    path.write_bytes(data)
    assert f"cannot be read as a video: {reason}" in refusal(path, CorruptInputError)


def test_a_last_frame_that_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mov", NOISE, coding="mjpeg", movflags="+faststart")
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat")
    data[at - 4 : at] = bytes(4)  # a length of 0 reaches to the end of the file, wherever it is
    path.write_bytes(data)
    assert len(open_video(path).times) == 12
    path.write_bytes(data[:-100])
    assert "it ends inside a frame" in refusal(path, CorruptInputError)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.fault("damaged image or video")
def test_flipped_bits_never_raise_anything_else(tmp_path: Path, suffix: str) -> None:
    whole = write(tmp_path / f"w{suffix}", levels(4)).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"v{suffix}"
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 1500), 3):
            data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with contextlib.suppress(CorruptInputError, UsageError):
            video = open_video(path)
            assert np.isfinite(video.times).all()
            video.read([0, len(video.times) - 1], 16, 16)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_no_frames(tmp_path: Path, suffix: str) -> None:
    refusal(write(tmp_path / f"v{suffix}", []), CorruptInputError)


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone(tmp_path: Path, cover: bool) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44_100, layout="mono")
        if cover:
            picture: Any = file.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
            file.mux(picture.encode(av.VideoFrame.from_ndarray(NOISE[0], format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 44_100, 0
        file.mux([*stream.encode(silence), *stream.encode(None)])
    assert "no video stream" in refusal(path, CorruptInputError)


@pytest.mark.parametrize("sides", [(65_535, 65_535), (65_535, 4000), (9000, 8000), (8001, 8000)])
@pytest.mark.fault("image bomb")
def test_huge_gif(tmp_path: Path, sides: tuple[int, int]) -> None:
    path = write(tmp_path / "v.gif", levels(2))
    with open(path, "r+b") as file:
        file.seek(6)
        file.write(struct.pack("<HH", *sides))
    message = refusal(path, UsageError)
    assert f"{sides[0]}x{sides[1]}, more than 64000000 pixels" in message


def test_huge_avi(tmp_path: Path) -> None:
    path = write(tmp_path / "v.avi", levels(2), coding="mjpeg")
    data = path.read_bytes()
    for layout in ("<ii", ">HH"):  # BITMAPINFOHEADER has the width first, a JPEG the height
        claimed, huge = ((64, 48), (8100, 8000)) if layout == "<ii" else ((48, 64), (8000, 8100))
        assert data.count(struct.pack(layout, *claimed)) >= 1
        data = data.replace(struct.pack(layout, *claimed), struct.pack(layout, *huge))
    path.write_bytes(data)
    assert "8100x8000, more than 64000000 pixels" in refusal(path, UsageError)


def test_frames_that_are_much_larger_than_the_file_says(tmp_path: Path) -> None:
    path = write(tmp_path / "v.webm", levels(2), coding="vp8")
    data = path.read_bytes()
    size = b"\x9d\x01\x2a" + struct.pack("<HH", 64, 48)  # of a key frame of VP8
    assert data.count(size) == 1
    path.write_bytes(data.replace(size, size[:3] + struct.pack("<HH", 16_000, 16_000)))
    refusal(path, CorruptInputError)


def test_no_size(tmp_path: Path) -> None:
    path = write(tmp_path / "v.gif", levels(2))
    with open(path, "r+b") as file:
        file.seek(6)
        file.write(struct.pack("<HH", 0, 10))
    assert "its frames are 0x10" in refusal(path, CorruptInputError)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    assert (video_input.MAX_PIXELS, video_input.MAX_FRAMES) == (64_000_000, 10_000)
    path = write(tmp_path / f"v{suffix}", levels(12))
    monkeypatch.setattr(video_input, "MAX_PIXELS", 64 * 48)
    monkeypatch.setattr(video_input, "MAX_FRAMES", 12)
    assert len(open_video(path).times) == 12
    monkeypatch.setattr(video_input, "MAX_FRAMES", 10)
    found = 11 if suffix in (".mkv", ".webm") else 12  # which have no count to look at beforehand
    assert f"at least {found} frames, more than 10;" in refusal(path, UsageError)
    monkeypatch.setattr(video_input, "MAX_PIXELS", 64 * 48 - 1)
    assert "64x48, more than 3071 pixels" in refusal(path, UsageError)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.fault("decoding without end")
def test_a_budget_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = write(tmp_path / f"v{suffix}", levels(12))
    monkeypatch.setattr(budget, "MAX_DECODED_PIXELS", 12 * 64 * 48)
    video = open_video(path)
    assert numbers(video.read([11], 48, 64)) == [11]
    monkeypatch.setattr(budget, "MAX_DECODED_PIXELS", 12 * 64 * 48 - 1)
    assert "has more than 36863 pixels in all its frames" in refusal(path, UsageError)
    with pytest.raises(UsageError, match="in all its frames"):
        video.read([11], 48, 64)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.fault("decoding without end")
def test_a_budget_of_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = write(tmp_path / f"v{suffix}", levels(12))
    clock = itertools.count()
    monkeypatch.setattr(budget.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(budget, "MAX_SECONDS", 100.0)
    open_video(path)
    monkeypatch.setattr(budget, "MAX_SECONDS", 5.0)
    assert "takes more than 5 s to decode" in refusal(path, UsageError)


@pytest.mark.fault("decoding without end")
def test_a_small_gif_of_many_large_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of one pixel, each of which shows the whole of a large picture."""
    path = write(tmp_path / "v.gif", levels(1))
    header = b"GIF89a" + struct.pack("<HHBBB", 4000, 4000, 0x80, 0, 0) + bytes(6)
    delay = b"!\xf9\4\0\4\0\0\0"
    frame = delay + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    path.write_bytes(header + frame * 40 + b";")
    monkeypatch.setattr(budget, "MAX_DECODED_PIXELS", 20 * 4000 * 4000)
    assert path.stat().st_size < 1000
    assert "pixels in all its frames" in refusal(path, UsageError)
