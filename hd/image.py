"""The one image loader, for training, evaluation and serving: bytes or a path -> RGB image.

Safety first: formats by allow-list, limits before anything is decoded, a damaged file is an error
and never a grey guess. PIL's (width, height) is turned to (height, width) in this file only.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from .errors import DataError
from .files import write_whole

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# What Pillow's decoders raise on damaged files (found by corrupting files of every format).
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    AssertionError,  # a PNG that names a palette and has none
    struct.error,
    zlib.error,
)

# EXIF orientation -> how to turn the picture upright (1 is upright already).
ORIENTATION_TAG = 0x0112
PNG_HEAD, PNG_END = 8, b"IEND\xaeB`\x82"
# Chunks that may hold EXIF or XMP, and the keywords of the texts that do.
PNG_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
PNG_TURNS, PNG_WORD = (b"Raw profile type exif", b"XML:com.adobe.xmp"), 80
# Where Pillow keeps what it read of them.
TURNING_NOTES = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageLimits:
    """What the loader refuses; checked on the file and its header, before decoding.

    max_pixels above Pillow's own limit (89 million) has no effect: its warning is an error here.
    max_side_px bounds the square that a padded view stands for.
    max_aspect: longest side over shortest; None allows every shape.
    """

    max_bytes: int = 256 * 2**20
    max_pixels: int = 80_000_000
    max_side_px: int = 32_768
    max_aspect: float | None = None


class ImageError(DataError):
    """An image that cannot be used: the message is one line with file, reason and remedy."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(f"{name}: {reason}; {remedy}")
        self.name, self.reason, self.remedy = name, reason, remedy


def load_image(source: str | Path | bytes, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """The RGB image of a file or of its bytes: upright, first frame, alpha on white, 8 bits.

    16-bit values are scaled by their type's range, 32-bit and float ones by the image's own range.
    Raises ImageError (exit code 3) for anything that is missing, foreign, too large or damaged.
    """
    name = _name(source)
    data = source if isinstance(source, bytes) else _read(Path(source), name, limits)
    with _opened(io.BytesIO(data), len(data), name, limits) as image:
        if image.format == "PNG" and data.rfind(PNG_END) < 0:
            raise OSError("image file is truncated, its end is missing")
        with _refusing_cut_files():
            image.load()
        return _rgb(_upright(image), name)


_PILLOWS_SWITCH = threading.Lock()


@contextmanager
def _refusing_cut_files() -> Iterator[None]:
    """Where another library of this process (lmms-eval) has told Pillow to fill in what a cut file
    lacks, that is put aside while ours is decoded."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _PILLOWS_SWITCH:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def read_bytes(source: Path | bytes, limits: ImageLimits = ImageLimits()) -> bytes:
    """The bytes of an image file, not looked into. Raises ImageError."""
    return source if isinstance(source, bytes) else _read(source, _name(source), limits)


def read_size(source: str | Path | bytes, limits: ImageLimits = ImageLimits()) -> tuple[int, int]:
    """(height, width) of the image that `load_image` would give, by its header: no pixels are
    decoded, but for a TIFF and for a PNG that says only behind its pixels how it is turned.

    Raises ImageError as `load_image` does, but finds no damage behind the header.
    """
    name = _name(source)
    if isinstance(source, bytes):
        file: IO[bytes] = io.BytesIO(source)
        num_bytes = len(source)
    else:
        with _readable(Path(source), name):
            num_bytes = _check_file(Path(source), name, limits)
            file = Path(source).open("rb")  # noqa: SIM115 (closed below)
    with file, _opened(file, num_bytes, name, limits) as image:
        if image.format == "TIFF" or (image.format == "PNG" and _turned_late(file)):
            return image_size(load_image(source, limits))
        height, width = image_size(image)
        turned = _orientation(image, load=False) in SIDEWAYS
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(
    file: IO[bytes], num_bytes: int, name: str, limits: ImageLimits
) -> Iterator[Image.Image]:
    """The image of a file once its header is checked; what goes wrong inside is an ImageError."""
    if num_bytes > limits.max_bytes:
        raise _too_many_bytes(name, num_bytes, limits)
    if not num_bytes:
        raise ImageError(name, "the file is empty", "fetch it again or leave it out")
    with warnings.catch_warnings():
        # Threads may restore each other's filters: at worst the bomb warning stays an error.
        warnings.simplefilter("ignore", UserWarning)  # e.g. damaged EXIF beside a sound picture
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_header(image, name, limits)
                yield image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ImageError(
                name, "more pixels than Pillow's limit (a decompression bomb?)", "make it smaller"
            ) from None
        except UnidentifiedImageError:
            raise ImageError(
                name,
                "not an image, or a damaged one",
                f"give a file in one of the formats {', '.join(FORMATS)}",
            ) from None
        except DECODE_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(
                name, f"damaged image ({reason})", "fetch it again or leave it out"
            ) from error


def _name(source: str | Path | bytes) -> str:
    """The source for a one-line message (line breaks and the like are escaped)."""
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    text = str(source)
    return text if text.isprintable() else repr(text)


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise ImageError(name, reason, "check the path and its permissions") from error


def _read(path: Path, name: str, limits: ImageLimits) -> bytes:
    with _readable(path, name):
        _check_file(path, name, limits)
        return path.read_bytes()


def _check_file(path: Path, name: str, limits: ImageLimits) -> int:
    """The bytes of a regular file within the limit."""
    if path.is_dir():
        raise ImageError(name, "is a folder", "name the image files in it")
    if not path.exists():
        raise ImageError(name, "no such file", "check the path")
    if not path.is_file():
        raise ImageError(name, "is not a regular file", "give an image file")
    num_bytes = path.stat().st_size
    if num_bytes > limits.max_bytes:
        raise _too_many_bytes(name, num_bytes, limits)
    return num_bytes


def _too_many_bytes(name: str, num_bytes: int, limits: ImageLimits) -> ImageError:
    reason = f"{num_bytes} bytes, above the limit of {limits.max_bytes}"
    return ImageError(name, reason, "make it smaller or raise max_bytes")


def _check_header(image: Image.Image, name: str, limits: ImageLimits) -> None:
    height, width = image_size(image)
    if height * width > limits.max_pixels:
        reason = f"{height}x{width} pixels, above the limit of {limits.max_pixels}"
        raise ImageError(name, reason, "make it smaller or raise max_pixels")
    if max(height, width) > limits.max_side_px:
        reason = f"{height}x{width} pixels, a side above the limit of {limits.max_side_px}"
        raise ImageError(name, reason, "make it smaller or raise max_side_px")
    aspect = max(height, width) / max(1, min(height, width))
    if limits.max_aspect is not None and aspect > limits.max_aspect:
        reason = f"{height}x{width} pixels, longer than {limits.max_aspect:g} to 1"
        raise ImageError(name, reason, "crop it or raise max_aspect")


def is_image(value: object) -> bool:
    """Whether a value is an image in memory, for callers that take what others made."""
    return isinstance(value, Image.Image)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image already in memory as `load_image` would give it, but for its size limits."""
    image = _upright(image)
    return image if image.mode == "RGB" else _rgb(image, "image in memory")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; the one that is turned says nothing of it any more."""
    method = UPRIGHT.get(_orientation(image, load=True))
    if method is None:
        return image
    turned = image.transpose(method)  # Pillow copies the notes, which would turn it again
    for key in TURNING_NOTES:
        turned.info.pop(key, None)
    return turned


def _orientation(image: Image.Image, load: bool) -> int:
    """What EXIF, or XMP, says; 1, upright, where there is none or it cannot be read. Without load,
    what stands behind the pixels of a PNG is not seen."""
    try:
        exif = image.getexif() if load else Image.Image.getexif(image)
        return exif.get(ORIENTATION_TAG, 1)
    except DECODE_ERRORS:
        return 1


def _turned_late(file: IO[bytes]) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels."""
    behind = False
    file.seek(PNG_HEAD)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if behind and kind in PNG_TEXTS:
            word = file.read(min(length, PNG_WORD))
            if kind == b"eXIf" or word.startswith(PNG_TURNS):
                return True
            length -= len(word)
        behind |= kind == b"IDAT"
        file.seek(length + 4, io.SEEK_CUR)  # and its checksum
    return False


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode -> RGB; alpha is blended onto white, wide modes are scaled and not clipped."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return from_array(np.repeat(_eight_bits(image, name)[..., None], 3, axis=2))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> np.ndarray:
    """uint8 `[height width]` of a 16-bit, 32-bit integer or float image."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ImageError(name, "holds NaN or infinite values", "save it as 8-bit PNG")
    values = values.astype(np.float64)
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (values.min(), values.max())
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    if "transparency" in image.info:  # a 16-bit grey PNG names one value as see-through
        scaled[values == image.info["transparency"]] = 255
    return np.rint(scaled).astype(np.uint8)


def image_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels."""
    return image.height, image.width


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at `size` (height, width), bicubic with antialiasing as in every LLaVA."""
    height, width = size
    return image.resize((width, height), Image.Resampling.BICUBIC)


def padded_rows(
    image: Image.Image, rows: tuple[int, int], place: tuple[int, int], rgb: tuple[int, int, int]
) -> Image.Image:
    """Rows (first, behind the last) of an RGB image on a ground of one colour; place: (left, width)
    in pixels, where they stand on it and how wide it is. The image itself where that is the same.
    """
    (first, last), (left, width) = rows, place
    if (last - first, width) == image_size(image):
        return image
    ground = Image.new("RGB", (width, last - first), rgb)
    ground.paste(image.crop((0, first, image.width, last)), (left, 0))
    return ground


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 `[height width 3]` of an RGB image (read-only view where possible)."""
    return np.asarray(image)


def from_array(pixels: np.ndarray) -> Image.Image:
    """The RGB image of uint8 `[height width 3]`. Raises ValueError for another shape or type."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected uint8 [height width 3], got {pixels.dtype} {pixels.shape}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """The image, or uint8 `[height width 3]`, as a PNG file's bytes."""
    buffer = io.BytesIO()
    picture = from_array(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def save_png(image: Image.Image | np.ndarray, path: str | Path) -> None:
    """Write the image, or uint8 `[height width 3]`, as PNG; the file appears whole or never."""
    write_whole(Path(path), png_bytes(image))
