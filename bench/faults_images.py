"""Forty image files that no run may train on, and odd ones that it must read.

What stands here is bytes that say themselves that they are broken. A JPEG, or a lossy WebP, has no
checksum: one whose compressed pixels were changed, or cut short and closed again by an end mark, is
decoded with grey or shifted blocks by every libjpeg, and no loader can tell. Nor is a PNG noticed
whose writer compressed too few rows, without a fault in any checksum. Neither is among these.
"""

from __future__ import annotations

import base64
import gzip
import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..hd.image import ImageLimits, from_array

SIZE = (90, 120)  # (height, width) in pixels
Content = bytes | Callable[[Path], None]  # of a file; or what makes a thing of that name


@dataclass(frozen=True)
class ImageFault:
    """A file that is no image to train on.

    says: words of the message. seen: what shows the fault: that there is no such regular file, the
    header (read before training, for the lengths of samples), or the pixels, when they are due.
    """

    name: str
    suffix: str
    content: Content
    says: str
    seen: Literal["file", "header", "pixels"]

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.name.replace(" ", "-") + self.suffix


@dataclass(frozen=True)
class FineImage:
    """A file that looks odd and is none the worse for it."""

    name: str
    suffix: str
    content: bytes

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.name.replace(" ", "-") + self.suffix


def write_content(path: Path, content: Content) -> None:
    """Make the file, or whatever stands in its place."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


@lru_cache
def pixels() -> np.ndarray:
    """A ramp with some noise, uint8 `[height width 3]`."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    noise = np.random.default_rng(0).integers(0, 20, (*SIZE, 3))
    return (np.stack([2 * x, 2 * y, x + y], axis=2) * 0.9 + noise).astype(np.uint8)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """The picture as a file of that format."""
    buffer = io.BytesIO()
    from_array(pixels()).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def image_faults() -> tuple[ImageFault, ...]:
    """All forty."""
    return (*_no_files(), *_other_kinds(), *_jpegs(), *_pngs(), *_others())


def fine_images() -> tuple[FineImage, ...]:
    """The odd ones that are read like any other."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    wide = pixels()[..., 0].astype(">u2") * 257
    turned = from_array(np.ascontiguousarray(pixels()[::-1]))
    return (
        FineImage("turned by exif", ".jpg", encoded("JPEG", exif=exif)),
        FineImage("exif that is none", ".jpg", encoded("JPEG", exif=b"Exif\0\0no header")),
        FineImage("four colours", ".jpg", encoded("JPEG", "CMYK")),
        FineImage("progressive", ".jpg", encoded("JPEG", progressive=True)),
        FineImage("bytes behind the end", ".jpg", encoded("JPEG") + b"\0" * 100),
        FineImage("png named jpg", ".jpg", encoded("PNG")),
        FineImage("one pixel", ".png", png((1, 1), bytes(4))),
        FineImage("a line of pixels", ".png", png((1, 600), bytes(1801))),
        FineImage("sixteen bits", ".png", png(SIZE, rows(wide.view(np.uint8)), 16, 0)),
        FineImage("one bit", ".png", encoded("PNG", "1")),
        FineImage("alpha", ".png", encoded("PNG", "RGBA")),
        FineImage("transparent palette", ".png", encoded("PNG", "P", transparency=3)),
        FineImage("two frames", ".gif", encoded("GIF", save_all=True, append_images=[turned])),
        FineImage("no end mark behind the frame", ".gif", encoded("GIF")[:-1]),
        FineImage("lossless", ".webp", encoded("WEBP", lossless=True)),
        FineImage("palette", ".bmp", encoded("BMP", "P")),
        FineImage("compressed", ".tif", encoded("TIFF", compression="tiff_lzw")),
        FineImage("fractions", ".tif", encoded("TIFF", "F")),
    )


def _no_files() -> tuple[ImageFault, ...]:
    def large(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(ImageLimits().max_bytes + 1)  # sparse: takes no space

    return (
        ImageFault("a folder", ".jpg", lambda path: path.mkdir(), "not a regular file", "file"),
        ImageFault("a pipe", ".jpg", lambda path: os.mkfifo(path), "not a regular file", "file"),
        ImageFault(
            "a link to nothing", ".jpg", lambda p: p.symlink_to("gone"), "No such file", "file"
        ),
        ImageFault("too many bytes", ".png", large, "above the limit", "header"),
    )


def _other_kinds() -> tuple[ImageFault, ...]:
    """What a download, or a careless copy, leaves under the name of an image."""
    jpeg = encoded("JPEG")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    found = {
        "an error page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "an error message": b'{"error": "rate limited"}',
        "a drawing": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "a pointer to the file": pointer,
        "packed": gzip.compress(jpeg),
        "as text": base64.b64encode(jpeg),
        "read as utf-8": jpeg.decode("utf-8", "replace").encode(),
        "zeros": bytes(4096),
        "noise": np.random.default_rng(1).bytes(4096),
        "another format": b"\0\0\0\x18ftypheic" + bytes(200),
    }
    empty = ImageFault("empty", ".jpg", b"", "the file is empty", "header")
    return empty, *(
        ImageFault(name, ".jpg", content, "not an image", "header")
        for name, content in found.items()
    )


def _jpegs() -> tuple[ImageFault, ...]:
    data, progressive = encoded("JPEG"), encoded("JPEG", progressive=True)
    frame, scan, half = data.index(b"\xff\xc0"), data.index(b"\xff\xda"), len(data) // 2
    no_width = data[: frame + 7] + b"\0\0" + data[frame + 9 :]
    found = {
        "cut in half": data[:half],
        "last byte missing": data[:-1],
        "cut behind the header": data[: scan + 20],
        "progressive cut in half": progressive[: len(progressive) // 2],
        "zeros from the middle": data[:half] + bytes(len(data) - half),
    }
    return (
        *(ImageFault(name, ".jpg", part, "truncated", "pixels") for name, part in found.items()),
        ImageFault(
            "ones in the middle",
            ".jpg",
            data[:half] + b"\xff" * 512 + data[half + 512 :],
            "broken data stream",
            "pixels",
        ),
        ImageFault(
            "no quantisation tables",
            ".jpg",
            data.replace(b"\xff\xdb", b"\xff\xe5"),
            "broken data stream",
            "pixels",
        ),
        ImageFault("cut in the header", ".jpg", data[:200], "Truncated File Read", "header"),
        ImageFault("no width", ".jpg", no_width, "not an image", "header"),
    )


def _pngs() -> tuple[ImageFault, ...]:
    data, raw = encoded("PNG"), rows(pixels())
    packed = zlib.compress(raw)
    flipped = bytearray(data)
    flipped[data.index(b"IDAT") + 500] ^= 1
    filtered = zlib.compress(b"".join(b"\x09" + raw[1 : 1 + 3 * SIZE[1]] for _ in range(SIZE[0])))
    grey = rows(pixels()[..., :1])
    bomb = png((20_000, 20_000), b"", 1, 0)
    long = png((1, ImageLimits().max_side_px + 1), bytes(ImageLimits().max_side_px + 2), 8, 0)
    return (
        ImageFault("cut in half", ".png", data[: len(data) // 2], "end is missing", "pixels"),
        ImageFault("no end chunk", ".png", data[:-12], "end is missing", "pixels"),
        ImageFault("a flipped bit", ".png", bytes(flipped), "damaged image", "pixels"),
        ImageFault(
            "pixels cut short",
            ".png",
            png_of(SIZE, packed[: len(packed) // 2]),
            "truncated",
            "pixels",
        ),
        ImageFault("no pixels", ".png", png_of(SIZE, None), "cannot load", "pixels"),
        ImageFault("unknown filter", ".png", png_of(SIZE, filtered), "damaged image", "pixels"),
        ImageFault("no palette", ".png", png(SIZE, grey, 8, 3), "damaged image", "pixels"),
        ImageFault("three bits", ".png", png(SIZE, raw, 3, 2), "not an image", "header"),
        ImageFault("cut in the header", ".png", data[:20], "Truncated File Read", "header"),
        ImageFault(
            "wrong checksum", ".png", data[:29] + bytes(4) + data[33:], "not an image", "header"
        ),
        ImageFault("bomb", ".png", bomb, "decompression bomb", "header"),
        ImageFault("too long a side", ".png", long, "a side above the limit", "header"),
    )


def _others() -> tuple[ImageFault, ...]:
    gif, webp, bmp = encoded("GIF"), encoded("WEBP"), encoded("BMP")
    holes = encoded("TIFF", "F")[:-4] + struct.pack("<f", float("nan"))
    return (
        ImageFault("cut in half", ".gif", gif[: len(gif) // 2], "truncated", "pixels"),
        ImageFault("cut in half", ".webp", webp[: len(webp) // 2], "damaged image", "header"),
        ImageFault("cut in half", ".bmp", bmp[: len(bmp) // 2], "truncated", "pixels"),
        # The loader reads a TIFF whole to know its size.
        ImageFault("no numbers", ".tif", holes, "NaN or infinite", "header"),
    )


def rows(values: np.ndarray) -> bytes:
    """A PNG's rows, each behind the number of its filter (none), of uint8 `[height ...]`."""
    return b"".join(b"\0" + row.tobytes() for row in values)


def png(size: tuple[int, int], raw: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of (height, width) out of rows; depth in bits, colour 0 grey, 2 RGB, 3 palette."""
    return png_of(size, zlib.compress(raw), depth, colour)


def png_of(size: tuple[int, int], packed: bytes | None, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG out of compressed rows, with right checksums; None leaves the chunk out."""
    height, width = size
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"" if packed is None else _chunk(b"IDAT", packed)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + body + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum
