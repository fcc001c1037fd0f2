"""hd/image.py: a size by the header alone is that of the image once it is decoded."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llava_hd.hd.image import ImageError, ImageLimits, image_size, load_image, read_size

ORIENTATION = 0x0112
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{}"/></x:xmpmeta>'
PICTURE = Image.fromarray(np.zeros((16, 24, 3), dtype=np.uint8))


def encoded(kind: str, orientation: int | None = None, image: Image.Image = PICTURE, **options):
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def behind_pixels(png: bytes, late: bytes) -> bytes:
    """The PNG with a chunk in front of its end."""
    end = png.rindex(b"IEND") - 4
    return png[:end] + late + png[end:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_exif_turns_the_size_as_it_turns_the_picture(kind, orientation, tmp_path):
    data = encoded(kind, orientation)
    path = tmp_path / "photo"
    path.write_bytes(data)
    expected = image_size(load_image(data))
    assert expected == ((24, 16) if orientation in (5, 6, 7, 8) else (16, 24))
    assert read_size(data) == read_size(path) == read_size(str(path)) == expected


@pytest.mark.parametrize("kind", ["GIF", "BMP", "MPO"])
def test_other_formats_have_the_size_of_their_first_picture(kind):
    options = {}
    if kind != "BMP":
        options = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), "red")]}
    data = encoded(kind, **options)
    assert read_size(data) == image_size(load_image(data)) == (16, 24)


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("where", ["jpeg", "png", "png behind", "tiff"])
def test_xmp_turns_the_size_too(orientation, where):
    text = XMP.format(orientation)
    late = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text.encode())
    early = PngInfo()
    early.add_itxt("XML:com.adobe.xmp", text)
    data = {
        "jpeg": lambda: encoded("JPEG", xmp=text.encode()),
        "png": lambda: encoded("PNG", pnginfo=early),
        "png behind": lambda: behind_pixels(encoded("PNG"), late),
        "tiff": lambda: encoded("TIFF", tiffinfo={700: text.encode()}),
    }[where]()
    assert read_size(data) == image_size(load_image(data))
    if where != "tiff":
        assert read_size(data) == ((16, 24) if orientation == 3 else (24, 16))


def test_exif_behind_the_pixels_of_a_png_is_seen():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = behind_pixels(encoded("PNG"), chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    assert read_size(data) == image_size(load_image(data)) == (24, 16)


def test_no_pixel_is_decoded_for_an_ordinary_file(monkeypatch):
    photos = [encoded(kind, 6) for kind in ("JPEG", "PNG")]
    photos.append(behind_pixels(encoded("PNG", 6), chunk(b"tEXt", b"date:create\0today")))

    def decode(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr("llava_hd.hd.image.load_image", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for data in photos:
        assert read_size(data) == (24, 16)
        assert read_size(data[:-4]) == (24, 16)  # damage behind the header is not looked for


def test_whatever_can_be_loaded_has_its_size():
    """Bytes of every format changed at random: where it still loads, the size agrees."""
    rng = random.Random(0)
    agreed = 0
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        whole = encoded(kind, 6 if kind in ("JPEG", "PNG", "WEBP", "TIFF") else None)
        for _ in range(120):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                image = load_image(bytes(data))
            except ImageError:
                continue
            assert read_size(bytes(data)) == image_size(image)
            agreed += 1
    assert agreed > 100


def test_what_is_refused_when_loaded_is_refused_by_its_header(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_size(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_size(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        read_size("x" * 300)
    for data, reason in ((b"", "empty"), (b"no image", "not an image"), (b"\xff\xd8\xff", "image")):
        (tmp_path / "bad").write_bytes(data)
        for source in (data, tmp_path / "bad"):
            with pytest.raises(ImageError, match=reason):
                read_size(source)
    data = encoded("PNG")
    for limits, reason in (
        (ImageLimits(max_pixels=100), "16x24 pixels, above the limit of 100"),
        (ImageLimits(max_bytes=10), "above the limit of 10"),
        (ImageLimits(max_aspect=1.2), "longer than 1.2 to 1"),
    ):
        with pytest.raises(ImageError, match=reason):
            read_size(data, limits)
