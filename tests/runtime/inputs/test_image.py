"""Every kind of image arrives as the pixels that were meant; every fault is one line."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile

import wanx.runtime.inputs.image as image_module
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.runtime.inputs import budget
from wanx.runtime.inputs.image import MAX_PIXELS, read_image, to_signed

Pixels = NDArray[np.uint8]
RNG = np.random.default_rng(0)
RGB: Pixels = RNG.integers(0, 256, (13, 19, 3), dtype=np.uint8)
GREY: Pixels = RNG.integers(0, 256, (13, 19), dtype=np.uint8)
ALPHA: Pixels = RNG.integers(0, 256, (13, 19), dtype=np.uint8)
COLOURS = np.array(
    [[230, 20, 30], [20, 200, 40], [30, 40, 220], [240, 230, 20], [20, 20, 20], [250, 250, 250]],
    np.uint8,
)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def read(data: bytes, folder: Path, name: str = "image.bin") -> Pixels:
    path = folder / name
    path.write_bytes(data)
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return pixels


def grey_rgb(grey: NDArray[Any]) -> Pixels:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def on_white(colours: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    opacity = alpha[..., None] / 255
    return np.asarray(colours * opacity + 255 * (1 - opacity))


def indexed() -> tuple[Image.Image, NDArray[np.uint8]]:
    """An image with a palette, and its indices."""
    indices = RNG.integers(0, len(COLOURS), (13, 19), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(COLOURS.tobytes())
    return image, indices


def tiff(tags: dict[int, int], data: bytes, order: str = "<") -> bytes:
    """A TIFF of one strip or tile, whose offset is the tag's value -1; every count is 1."""
    start = 8 + 2 + 12 * len(tags) + 4
    out = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    for tag, value in sorted(tags.items()):
        out += struct.pack(order + "HHII", tag, 4, 1, start if value == -1 else value)
    return out + bytes(4) + data


def grey_tiff(levels: NDArray[Any], order: str = "<", **changes: int) -> bytes:
    data = levels.tobytes()
    tags = {256: levels.shape[1], 257: levels.shape[0], 258: 8 * levels.itemsize, 259: 1, 262: 1}
    tags |= {273: -1, 277: 1, 278: levels.shape[0], 279: len(data)}
    tags |= {int(name.removeprefix("tag")): value for name, value in changes.items()}
    return tiff(tags, data, order)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "packbits"}),
        ("TIFF", {"big_tiff": True}),
    ],
)
def test_rgb(format: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert np.array_equal(read(encode(Image.fromarray(RGB), format, **options), tmp_path), RGB)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey_one_bit_and_palette(format: str, tmp_path: Path) -> None:
    grey = encode(Image.fromarray(GREY), format)
    assert np.array_equal(read(grey, tmp_path), grey_rgb(GREY))
    bits = encode(Image.fromarray(GREY > 99), format)
    assert np.array_equal(read(bits, tmp_path), grey_rgb((GREY > 99) * 255))
    image, indices = indexed()
    assert np.array_equal(read(encode(image, format), tmp_path), COLOURS[indices])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1)])
def test_one_pixel_sides(format: str, shape: tuple[int, int], tmp_path: Path) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    grey = RNG.integers(0, 256, shape, dtype=np.uint8)
    data = encode(Image.fromarray(grey), format, **options)
    assert np.array_equal(read(data, tmp_path), grey_rgb(grey))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(mode: str, progressive: bool, tmp_path: Path) -> None:
    blocks = np.repeat(np.repeat(COLOURS.reshape(2, 3, 3), 16, 0), 16, 1)
    source = Image.fromarray(blocks).convert(mode)
    data = encode(source, "JPEG", quality=95, subsampling=0, progressive=progressive)
    pixels = read(data, tmp_path)
    assert np.array_equal(pixels, np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    expected = grey_rgb(np.array(source)) if mode == "L" else blocks
    assert np.abs(pixels.astype(int) - expected).max() <= 6


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_tiff_in_other_colour_spaces(mode: str, tmp_path: Path) -> None:
    blocks = np.repeat(COLOURS[None], 4, axis=0)
    source = Image.fromarray(blocks)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
        converted = ImageCms.applyTransform(source, transform)
    else:
        converted = source.convert(mode)
    assert converted is not None
    assert converted.mode == mode
    pixels = read(encode(converted, "TIFF"), tmp_path)
    assert np.abs(pixels.astype(int) - blocks).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_put_on_white(format: str, tmp_path: Path) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    source = Image.fromarray(np.concatenate([RGB, ALPHA[..., None]], axis=-1))
    pixels = read(encode(source, format, **options), tmp_path)
    assert np.abs(pixels - on_white(RGB, ALPHA)).max() <= 0.51


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_with_alpha(format: str, tmp_path: Path) -> None:
    source = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    pixels = read(encode(source, format), tmp_path)
    assert np.abs(pixels - on_white(grey_rgb(GREY), ALPHA)).max() <= 0.51


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour(format: str, tmp_path: Path) -> None:
    image, indices = indexed()
    pixels = read(encode(image, format, transparency=2), tmp_path)
    assert np.array_equal(pixels, np.where(indices[..., None] == 2, 255, COLOURS[indices]))


def test_palette_with_an_alpha_for_each_colour(tmp_path: Path) -> None:
    image, indices = indexed()
    alphas = bytes([255, 0, 100, 17, 200, 254])
    pixels = read(encode(image, "PNG", transparency=alphas), tmp_path)
    alpha = np.frombuffer(alphas, np.uint8)[indices]
    assert np.abs(pixels - on_white(COLOURS[indices], alpha)).max() <= 0.51


def test_transparent_colours_without_palette(tmp_path: Path) -> None:
    grey = RNG.integers(0, 4, (13, 19), dtype=np.uint8)
    eight = read(encode(Image.fromarray(grey), "PNG", transparency=2), tmp_path)
    assert np.array_equal(eight, grey_rgb(np.where(grey == 2, 255, grey)))
    levels = grey.astype(np.uint16) * 2570
    sixteen = read(encode(Image.fromarray(levels), "PNG", transparency=5140), tmp_path)
    assert np.array_equal(sixteen, grey_rgb(np.where(grey == 2, 255, grey * 10)))
    source = Image.fromarray(COLOURS[grey])
    colour = read(encode(source, "PNG", transparency=tuple(COLOURS[2].tolist())), tmp_path)
    assert np.array_equal(colour, np.where(grey[..., None] == 2, 255, COLOURS[grey]))


EVERY_LEVEL = np.arange(65536).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF of I", "TIFF, big-endian"])
def test_16_bits_are_scaled(kind: str, tmp_path: Path) -> None:
    levels = EVERY_LEVEL.astype(np.int32 if kind.endswith("I") else np.uint16)
    if kind == "TIFF, big-endian":
        data = grey_tiff(levels.astype(">u2"), ">")
    else:
        data = encode(Image.fromarray(levels), kind.partition(" ")[0])
    assert np.array_equal(read(data, tmp_path), grey_rgb(np.rint(EVERY_LEVEL / 257)))


def test_16_bits_where_0_is_white(tmp_path: Path) -> None:
    pixels = read(grey_tiff(EVERY_LEVEL.astype("<u2"), tag262=0), tmp_path)
    assert np.array_equal(pixels, grey_rgb(np.rint(255 - EVERY_LEVEL / 257)))


def test_12_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.arange(4096).reshape(64, 64)
    high, low = levels[:, 0::2], levels[:, 1::2]
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=-1)
    data = grey_tiff(packed.astype(np.uint8).reshape(64, 96), tag256=64, tag258=12)
    assert np.array_equal(read(data, tmp_path), grey_rgb(np.rint(levels * (255 / 4095))))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_the_first_frame_counts(format: str, tmp_path: Path) -> None:
    """MPO is what many telephones write: a JPEG with more of them behind it."""
    frames = [Image.new("RGB", (32, 32), tuple(colour)) for colour in COLOURS[:3].tolist()]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    pixels = read(data, tmp_path)
    assert pixels.shape == (32, 32, 3)
    assert np.abs(pixels.astype(int) - COLOURS[0]).max() <= (3 if format == "MPO" else 0)


# What a camera stores for a scene, by the meaning of EXIF's orientation: which edges of the scene
# the first row and the first column show.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda scene: scene,  # top, left
    2: lambda scene: scene[:, ::-1],  # top, right
    3: lambda scene: scene[::-1, ::-1],  # bottom, right
    4: lambda scene: scene[::-1],  # bottom, left
    5: lambda scene: scene.swapaxes(0, 1),  # left, top
    6: lambda scene: scene[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda scene: scene[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda scene: scene[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*STORED, 0, 9])
def test_exif_orientation(orientation: int, format: str, tmp_path: Path) -> None:
    scene = np.repeat(np.repeat(COLOURS.reshape(2, 3, 3), 16, 0), 16, 1)
    stored = np.ascontiguousarray(STORED.get(orientation, STORED[1])(scene))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}}.get(format, {"quality": 95, "subsampling": 0})
    data = encode(Image.fromarray(stored), format, exif=exif, **options)
    pixels = read(data, tmp_path)
    assert pixels.shape == scene.shape
    assert np.abs(pixels.astype(int) - scene).max() <= (6 if format == "JPEG" else 0)


def test_orientation_of_16_bits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = GREY.astype(np.uint16) * 257
    data = encode(Image.fromarray(levels), "PNG", exif=exif)
    assert np.array_equal(read(data, tmp_path), grey_rgb(np.rot90(GREY, -1)))


@pytest.mark.parametrize("name", ["http:image.png", "-y.png", "image", "фото.jpg", "a b'\"$.gif"])
def test_names_mean_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(encode(Image.fromarray(RGB), "PNG"))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(read_image(name), RGB)
    (tmp_path / "link").symlink_to(name)
    assert np.array_equal(read_image("link"), RGB)


def refusal(kind: type[WanxError], path: str | Path) -> str:
    with pytest.raises(kind) as caught:
        read_image(path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or repr(str(path)) in str(caught.value)
    return str(caught.value)


def test_missing(tmp_path: Path) -> None:
    assert "does not exist" in refusal(UsageError, tmp_path / "nothing.png")
    (tmp_path / "link").symlink_to("nothing.png")
    assert "does not exist" in refusal(UsageError, tmp_path / "link")
    (tmp_path / "file").write_bytes(b"")
    assert "does not exist" in refusal(UsageError, tmp_path / "file" / "image.png")


def test_urls_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_image("http://127.0.0.1/image.png")


@pytest.mark.parametrize("name", ["a\0b.png", "\0", "\ud800.png"])
def test_impossible_names(name: str) -> None:
    assert "use another" in refusal(UsageError, name)


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in refusal(UsageError, tmp_path)


def test_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "not a regular file" in refusal(CorruptInputError, path)


def test_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    assert "links" in refusal(WanxError, tmp_path / "link")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.fromarray(RGB), "PNG"))
    monkeypatch.setattr(Path, "open", deny)
    assert "permission denied" in refusal(WanxError, path)
    monkeypatch.setattr(Path, "stat", deny)  # its folder cannot be entered
    assert "permission denied" in refusal(WanxError, path)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "it is empty"),
        (b"a red circle\n", "it begins with b'a red circle'"),
        (b"\x89PNG", "it begins with"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "it begins with"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS pointer"),
    ],
)
def test_no_image(data: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(data)
    assert found in refusal(CorruptInputError, path)


@pytest.mark.parametrize("format", ["PPM", "ICO", "EPS", "PDF", "TGA", "PCX", "JPEG2000", "ICNS"])
def test_other_formats_are_refused(format: str, tmp_path: Path) -> None:
    """Pillow reads most of these; their decoders are not needed, and some start programs."""
    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.new("RGB", (16, 16)), format))
    assert "use PNG, JPEG" in refusal(CorruptInputError, path)


def small_files() -> dict[str, bytes]:
    image = Image.fromarray(RGB[:5, :7])
    palette = image.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png": encode(image, "PNG"),
        "png, palette": encode(palette, "PNG", transparency=3),
        "jpeg": encode(image, "JPEG", exif=exif),
        "jpeg, progressive": encode(image, "JPEG", progressive=True),
        "webp": encode(image, "WEBP"),
        "webp, lossless": encode(image, "WEBP", lossless=True),
        "bmp": encode(image, "BMP"),
        "bmp, palette": encode(palette, "BMP"),
        "tiff": encode(image, "TIFF"),
        "tiff, deflate": encode(image, "TIFF", compression="tiff_adobe_deflate"),
        "tiff, 16 bits": encode(Image.fromarray(GREY[:5, :7].astype(np.uint16)), "TIFF"),
        "gif": encode(palette, "GIF"),
    }


@pytest.fixture(params=small_files())
def small_file(request: pytest.FixtureRequest) -> bytes:
    return small_files()[request.param]


@pytest.mark.fault("damaged image or video")
def test_truncated_anywhere(small_file: bytes, tmp_path: Path) -> None:
    """A file is refused unless all that is missing comes after the pixels."""
    whole = read(small_file, tmp_path)
    path = tmp_path / "image.bin"
    refusals = []
    for length in range(len(small_file)):
        path.write_bytes(small_file[:length])
        try:
            pixels = read_image(path)
        except CorruptInputError as error:
            refusals.append(str(error))
        else:
            assert np.array_equal(pixels, whole), length
    assert len(refusals) >= len(small_file) - 24  # the checksums and the end of a PNG
    assert not any("\n" in refusal for refusal in refusals)


@pytest.mark.fault("damaged image or video")
def test_damaged_anywhere(small_file: bytes, tmp_path: Path) -> None:
    """Nothing but an image or an error of ours comes out."""
    generator = np.random.default_rng(1)
    path = tmp_path / "image.bin"
    refusals = []
    for reach in [len(small_file), 64] * 150:
        damaged = np.frombuffer(small_file, np.uint8).copy()
        places = generator.integers(0, reach, generator.integers(1, 4))
        damaged[places] = generator.integers(0, 256, len(places))
        path.write_bytes(damaged.tobytes())
        try:
            pixels = read_image(path)
        except WanxError as error:
            refusals.append(str(error))
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] == (3,)
    assert refusals
    assert not any("\n" in refusal for refusal in refusals)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"])
@pytest.mark.fault("noise of a decoder")
def test_nothing_is_said_beside_the_error(
    compression: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither by Pillow nor by libtiff, which writes to the descriptor itself."""
    image = Image.fromarray(RGB).convert("1" if compression == "group4" else "RGB")
    data = encode(image, "TIFF", compression=compression)
    path = tmp_path / "image.tif"
    generator = np.random.default_rng(2)
    refusals = 0
    for number in range(120):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(8, len(data), 3)] = generator.integers(0, 256, 3)
        kept = len(data) if number % 3 else int(generator.integers(8, len(data)))
        path.write_bytes(damaged[:kept].tobytes())
        try:
            read_image(path)
        except WanxError:
            refusals += 1
    assert refusals > 20
    os.write(2, b"still there")
    assert capfd.readouterr() == ("", "still there")


def test_reading_with_stderr_closed(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(encode(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"))
    code = (
        f"from wanx.runtime.inputs.image import read_image; print(read_image({str(path)!r}).shape)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stdout) == (0, "(13, 19, 3)\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError("a\nb"),
        ValueError("a\nb"),
        SyntaxError("a\nb"),
        struct.error("a\nb"),
        zlib.error("a\nb"),
        EOFError(),
        KeyError(259),
        IndexError(),
        TypeError("a\nb"),
        ZeroDivisionError("a\nb"),
        RuntimeError("a\nb"),
    ],
    ids=repr,
)
def test_whatever_a_decoder_raises(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.fromarray(RGB), "PNG"))
    fail_on_decoding(monkeypatch, error)
    reason = {"EOFError": "EOFError", "KeyError": "259", "IndexError": "IndexError"}
    expected = reason.get(type(error).__name__, "a b")
    assert f"({expected})" in refusal(CorruptInputError, path)


def fail_on_decoding(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def load(*_: object) -> None:
        raise error

    for plugin in ("Png", "Jpeg", "Gif", "Bmp", "Tiff", "WebP"):
        monkeypatch.setattr(f"PIL.{plugin}ImagePlugin.{plugin}ImageFile.load", load)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


def test_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.fromarray(RGB), "PNG"))
    fail_on_decoding(monkeypatch, MemoryError())
    assert "memory" in refusal(WanxError, path)


def test_interruption_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.fromarray(RGB), "PNG"))
    fail_on_decoding(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        read_image(path)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes, after: bytes = b"IHDR") -> bytes:
    """A PNG with more chunks behind the header, or behind the pixels."""
    data = encode(Image.fromarray(RGB), "PNG")
    at = 33 if after == b"IHDR" else data.index(b"IEND") - 4
    return data[:at] + b"".join(chunks) + data[at:]


MANY = bytes(5 << 20)
RAW_EXIF = b"Raw profile type exif\0"
METADATA: dict[str, bytes] = {
    "large compressed text": png_chunk(b"zTXt", b"prompt\0\0" + zlib.compress(MANY)),
    "large international text": png_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(MANY)),
    "large plain text": png_chunk(b"tEXt", b"workflow\0" + b"x" * len(MANY)),
    "too many texts": png_chunk(b"tEXt", b"a\0" + b"x" * len(MANY)) * 14,
    "large XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(MANY)),
    "many XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(MANY[: 1 << 20]))
    * 80,
    "large raw EXIF": png_chunk(b"zTXt", RAW_EXIF + b"\0" + zlib.compress(MANY)),
    "raw EXIF that is no hexadecimal": png_chunk(b"tEXt", RAW_EXIF + b"\nexif\n 4\nzz\n"),
    "unknown compression": png_chunk(b"zTXt", RAW_EXIF + b"\7abc"),
    "text that does not unpack": png_chunk(b"zTXt", RAW_EXIF + b"\0abc"),
    "large profile": png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(MANY)),
    "profile that does not unpack": png_chunk(b"iCCP", b"icc\0\0abc"),
    "profile of unknown compression": png_chunk(b"iCCP", b"icc\0\7abc"),
    "profile without end": png_chunk(b"iCCP", b"icc"),
    "empty EXIF": png_chunk(b"eXIf", b""),
    "EXIF that is none": png_chunk(b"eXIf", b"not TIFF at all"),
    "cut EXIF": png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x05\1\x12"),
    "large EXIF": png_chunk(b"eXIf", MANY),
    "short chunks": b"".join(png_chunk(k, b"") for k in (b"gAMA", b"cHRM", b"sRGB", b"pHYs")),
    "animation without end": png_chunk(b"acTL", b"") + png_chunk(b"fcTL", bytes(26)),
    "wrong checksum": png_chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "EXIF of a wrong checksum": png_chunk(b"eXIf", b"MM")[:-4] + b"abcd",
}


@pytest.mark.parametrize("after", [b"IHDR", b"IDAT"])
@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.fault("odd metadata")
def test_metadata_that_is_not_needed(kind: str, after: bytes, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read(png_with(METADATA[kind], after=after), tmp_path), RGB)


@pytest.mark.parametrize("after", [b"IHDR", b"IDAT"])
@pytest.mark.parametrize("kind", ["eXIf", "tEXt", "zTXt", "XMP", "compressed XMP"])
def test_orientation_of_a_png(kind: str, after: bytes, tmp_path: Path) -> None:
    """Each way to say that the camera was turned, beside a text that is too large."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = b"\nexif\n   26\n" + exif.tobytes().hex().encode() + b"\n"
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    chunk = {
        "eXIf": png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
        "tEXt": png_chunk(b"tEXt", RAW_EXIF + raw),
        "zTXt": png_chunk(b"zTXt", RAW_EXIF + b"\0" + zlib.compress(raw)),
        "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        "compressed XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
    }[kind]
    data = png_with(METADATA["large compressed text"], chunk, after=after)
    assert np.array_equal(read(data, tmp_path), np.rot90(RGB, -1))


@pytest.mark.parametrize("is_frame", [False, True])
def test_an_animated_png_begins_with_its_first_picture(is_frame: bool, tmp_path: Path) -> None:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    data = encode(
        frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=not is_frame
    )
    assert np.array_equal(read(data, tmp_path), RGB)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [b"", b"not TIFF at all", b"MM\0*\0\0\0\x08\0\x05\1\x12"])
@pytest.mark.fault("odd metadata")
def test_bad_exif_in_other_formats(format: str, exif: bytes, tmp_path: Path) -> None:
    data = encode(Image.fromarray(RGB), format, exif=b"Exif\0\0" + exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(data, tmp_path).shape == RGB.shape


def test_a_png_of_incompressible_pixels(tmp_path: Path) -> None:
    for shape in ((700, 700, 4), (3, 90_000, 4), (90_000, 3, 4)):
        noise = RNG.integers(0, 256, shape, dtype=np.uint8)
        noise[..., 3] = 255
        data = encode(Image.fromarray(noise), "PNG", compress_level=0)
        assert np.array_equal(read(data, tmp_path), noise[..., :3])


@pytest.mark.fault("decoding without end")
def test_a_png_with_no_end_of_pixels(tmp_path: Path) -> None:
    """What comes after the last pixel is neither read nor kept."""
    data = png_with(png_chunk(b"IDAT", MANY) * 4, after=b"IDAT")
    assert np.array_equal(read(data, tmp_path), RGB)


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
              for c in (header, data, b"IEND")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_header(width: int, height: int) -> bytes:
    data = encode(Image.fromarray(RGB), "JPEG")
    size = struct.pack(">HH", *RGB.shape[:2])
    assert data.count(size) == 1
    return data.replace(size, struct.pack(">HH", height, width))


def gif_header(width: int, height: int) -> bytes:
    data = encode(Image.fromarray(GREY), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def bmp_header(width: int, height: int) -> bytes:
    data = encode(Image.fromarray(RGB), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def webp_header(width: int, height: int) -> bytes:
    """A lossless WebP, whose header holds 14 bits of each side less one."""
    data = encode(Image.fromarray(RGB), "WEBP", lossless=True)
    assert data[12:16] == b"VP8L"
    (bits,) = struct.unpack("<I", data[21:25])
    bits = bits >> 28 << 28 | (height - 1) << 14 | (width - 1)
    return data[:21] + struct.pack("<I", bits) + data[25:]


def tiff_header(width: int, height: int) -> bytes:
    return grey_tiff(GREY, tag256=width, tag257=height, tag278=height)


@pytest.mark.parametrize(
    ("header", "width", "height"),
    [
        (png_header, 60000, 60000),
        (png_header, 8001, 8000),
        (png_header, 64_000_001, 1),
        (png_header, 2**31 - 1, 2**31 - 1),
        (jpeg_header, 60000, 60000),
        (gif_header, 60000, 60000),
        (bmp_header, 60000, 60000),
        (webp_header, 9000, 9000),
        (tiff_header, 60000, 60000),
    ],
)
@pytest.mark.fault("image bomb")
def test_bombs_are_refused_by_their_header(
    header: Callable[[int, int], bytes],
    width: int,
    height: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(header(width, height))
    fail_on_decoding(monkeypatch, AssertionError("the decoder has begun"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(UsageError, path)
    assert f"is {width}x{height}, which is {width * height} pixels" in message
    assert f"the limit of {MAX_PIXELS};" in message


def test_webp_bomb_that_pillow_refuses_itself(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(webp_header(16383, 16383))
    message = refusal(UsageError, path)
    assert f"{MAX_PIXELS} pixels" in message
    assert str(16383**2) in message or "16383x16383" in message


def test_bomb_in_a_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small image may be the corner of a tile that unpacks to gigabytes."""
    fail_on_decoding(monkeypatch, AssertionError("the decoder has begun"))
    data = zlib.compress(bytes(100_000))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1}
    tags |= {322: 20000, 323: 20000, 324: -1, 325: len(data)}
    path = tmp_path / "bomb"
    path.write_bytes(tiff(tags, data))
    assert "has tiles of 20000x20000, which is 400000000" in refusal(UsageError, path)


@pytest.mark.fault("decoding without end")
def test_a_jpeg_of_scans_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a few bytes passes over every pixel again."""
    data = encode(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    path = tmp_path / "image.jpg"
    path.write_bytes(data[:-2] + scan * 100 + data[-2:])
    assert read_image(path).shape == (1000, 1000, 3)
    path.write_bytes(data[:-2] + scan * 20_000 + data[-2:])
    monkeypatch.setattr(budget, "MAX_SECONDS", 0.5)
    start = time.monotonic()
    assert "takes more than 0.5 s to decode" in refusal(UsageError, path)
    assert time.monotonic() - start < 10  # of the minute or so that all scans take


def test_the_limit_itself_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(RGB), "PNG")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 13 * 19)
    assert np.array_equal(read(data, tmp_path), RGB)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 13 * 19 - 1)
    refusal(UsageError, tmp_path / "image.bin")


def test_levels_without_a_white(tmp_path: Path) -> None:
    path = tmp_path / "image.tiff"
    floats = Image.fromarray(np.zeros((3, 4), np.float32))
    path.write_bytes(encode(floats, "TIFF"))
    assert "floating-point" in refusal(UsageError, path)
    for low, high in [(-1, 5), (0, 65536), (-(2**31), 2**31 - 1)]:
        wide = Image.fromarray(np.array([[low, high]], np.int32))
        path.write_bytes(encode(wide, "TIFF"))
        assert f"levels from {low} to {high}," in refusal(UsageError, path)


@pytest.mark.parametrize("shape", [(), (2,), (5, 2)])
def test_to_signed_equals_torch(shape: tuple[int, ...]) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([pixels, pixels.T, 255 - pixels], axis=-1)
    pixels = np.broadcast_to(pixels, (*shape, *pixels.shape)).copy()
    before = pixels.copy()
    order = (pixels.ndim - 1, *range(pixels.ndim - 1))
    expected = torch.from_numpy(pixels).permute(order).float().div(255).sub(0.5).div(0.5)
    signed = to_signed(pixels)
    assert signed.dtype == np.float32
    assert signed.flags.c_contiguous
    assert np.array_equal(signed, expected.numpy())
    assert np.array_equal(pixels, before)
    assert signed.min() == -1
    assert signed.max() == 1
