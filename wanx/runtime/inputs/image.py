"""Reader of images from anywhere: few formats, a cap on the pixels, always 8-bit RGB."""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.files.input_file import open_input
from wanx.runtime.inputs.budget import TimedReader
from wanx.runtime.inputs.png import without_metadata
from wanx.runtime.native_call import silenced_stderr

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MAX_PIXELS = 64_000_000
_FORMATS = "PNG, JPEG, WebP, BMP, TIFF or GIF"

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_TILE_WIDTH = 322
_TIFF_TILE_LENGTH = 323
_EXIF_ORIENTATION = 274
_JPEG_BLOCK = 512  # bytes; a scan may have 15, and time is looked at between blocks only


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read an image as it is meant to be seen, upright and on white where it is transparent.

    The first frame counts. Embedded colour profiles are ignored, as the published pipelines do.

    Args:
        path: A regular file; ``http:…`` too is only the name of one.

    Returns:
        [H, W, 3] in RGB, at least 1x1.

    Raises:
        UsageError: There is no such file, it has more than ``MAX_PIXELS`` pixels or takes too long
            to decode, or its levels have no agreed white.
        CorruptInputError: The file is damaged, or no image in one of the formats above.
        WanxError: The operating system refuses to read it, or memory does not suffice.
    """
    path = Path(path)
    with _open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata, or beside an error that says it
        try:
            image = _decode(file, path)
        except WanxError:
            raise
        except MemoryError:
            raise WanxError(
                f"memory does not suffice to read {path}; use a smaller version of it"
            ) from None
        except Exception as error:  # a decoder raises whatever its parser stumbles over
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CorruptInputError(
                f"{path} is damaged or cannot be decoded ({reason}); save it again as {_FORMATS}"
            ) from None
    return np.array(image)


def to_signed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Map 0..255 to [-1, 1], with the operations of the published pipelines: equal to the bit.

    Args:
        pixels: [..., H, W, 3].

    Returns:
        [3, ..., H, W].
    """
    values = np.moveaxis(pixels, -1, 0).astype(np.float32, order="C")
    values /= 255
    values -= 0.5
    values /= 0.5
    return values


def _open(path: Path) -> BufferedReader:
    """Open a file that the user named, which ``open_input`` takes for a part of a checkpoint."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"the image {path} does not exist; check its name") from None
    except ValueError as error:  # a NUL or half a surrogate
        raise UsageError(
            f"the image name {str(path)!r} is impossible ({error}); use another"
        ) from None
    except OSError:
        is_folder = False  # open_input says what is wrong
    if is_folder:
        raise UsageError(f"{path} is a folder; name an image inside it")
    return open_input(path)


def _decode(file: BufferedReader, path: Path) -> Image:
    from PIL.Image import DecompressionBombError

    try:
        image = _read_header(file, path)
        _check(image, path)
        # libtiff repeats every error there, at length.
        with silenced_stderr(always=True) if image.format == "TIFF" else contextlib.nullcontext():
            image.load()
    except DecompressionBombError as error:  # Pillow's own, higher cap
        raise UsageError(
            f"{path} has more than {MAX_PIXELS} pixels ({error}); use a smaller version of it"
        ) from None
    return _upright(_to_rgb(image, path), _exif_orientation(image))


def _read_header(file: BufferedReader, path: Path) -> ImageFile:
    """Let the format's own class read the header.

    ``Image.open`` would hide why a header is wrong, and warn of a large image before its size is
    known here.
    """
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.TiffImagePlugin import TiffImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    signatures: dict[bytes, type[ImageFile]] = {
        b"\x89PNG\r\n\x1a\n": PngImageFile,
        b"\xff\xd8\xff": JpegImageFile,
        b"BM": BmpImageFile,
        b"GIF87a": GifImageFile,
        b"GIF89a": GifImageFile,
        b"II*\0": TiffImageFile,
        b"MM\0*": TiffImageFile,
        b"II+\0": TiffImageFile,
        b"MM\0+": TiffImageFile,
        b"WEBP": WebPImageFile,
    }
    head = file.read(12)
    file.seek(0)
    if head.startswith(b"RIFF"):
        head = head[8:]
    for signature, plugin in signatures.items():
        if head.startswith(signature):
            if plugin is JpegImageFile:  # the only one that may repeat its pixels without end
                image = plugin(TimedReader(file, path), str(path))
                image.decodermaxblock = _JPEG_BLOCK
                return image
            if plugin is PngImageFile:
                return plugin(without_metadata(file, MAX_PIXELS), str(path))
            return plugin(file, str(path))
    content = f"it begins with {head!r}" if head else "it is empty"
    raise CorruptInputError(f"{path} is not an image that can be read: {content}; use {_FORMATS}")


def _check(image: ImageFile, path: Path) -> None:
    """Refuse by the header alone what must not be decoded."""
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(_TIFF_TILE_WIDTH, 1)), int(tags.get(_TIFF_TILE_LENGTH, 1))
    for verb, (width, height) in ("is", image.size), ("has tiles of", tile):
        if width * height > MAX_PIXELS:
            raise UsageError(
                f"{path} {verb} {width}x{height}, which is {width * height} pixels and more than "
                f"the limit of {MAX_PIXELS}; use a smaller version of it"
            )
    if image.mode == "F":
        raise UsageError(
            f"{path} has floating-point levels, of which none is known to be white; save it with "
            f"8 or 16 bits"
        )


def _to_rgb(image: ImageFile, path: Path) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray(_grey_to_uint8(image, path)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(colours, mask=colours)
    return canvas


def _grey_to_uint8(image: ImageFile, path: Path) -> NDArray[np.uint8]:
    """Scale grey levels of more than 8 bits, which Pillow would clip at 255.

    Pillow hands out 12-bit levels as they are and does not invert where 0 is white.
    """
    levels = np.asarray(image).astype(np.int32)
    lowest, highest = int(levels.min()), int(levels.max())
    if lowest < 0 or highest > 65535:
        raise UsageError(
            f"{path} has 32-bit levels from {lowest} to {highest}, of which none is known to be "
            f"white; save it with 8 or 16 bits"
        )
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(_TIFF_BITS_PER_SAMPLE) == (12,) else 65535
    if tags.get(_TIFF_PHOTOMETRIC) == 0:
        levels = white - levels
    grey = ((levels * 255 + white // 2) // white).astype(np.uint8)
    grey[levels == image.info.get("transparency", -1)] = 255
    return grey


def _exif_orientation(image: ImageFile) -> object:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # no metadata is worth an image whose pixels are sound
        return None


def _upright(image: Image, orientation: object) -> Image:
    """Undo what the EXIF orientation says the camera did; 1 and unknown values are upright."""
    from PIL.Image import Transpose

    undo = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(undo[orientation]) if orientation in undo else image
