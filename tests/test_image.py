"""hd/image.py: an ordinary file becomes an upright RGB image, any other a one-line error."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from llava_hd.hd.errors import DataError
from llava_hd.hd.image import (
    FORMATS,
    ImageError,
    ImageLimits,
    as_rgb,
    from_array,
    image_size,
    load_image,
    png_bytes,
    resize,
    save_png,
    to_array,
)

# A picture without symmetry: red, green / blue, white, of 8 x 12 pixels each.
QUARTERS = np.zeros((16, 24, 3), dtype=np.uint8)
QUARTERS[:8, :12, 0] = QUARTERS[:8, 12:, 1] = QUARTERS[8:, :12, 2] = 255
QUARTERS[8:, 12:] = 255
PICTURE = Image.fromarray(QUARTERS)


def test_a_name_too_long_for_the_system_is_an_image_error():
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("x" * 300)


def test_an_image_in_memory_becomes_rgb_as_a_file_would(tmp_path):
    rgba = Image.new("RGBA", (3, 2), (200, 10, 10, 0))
    rgba.save(tmp_path / "clear.png")
    assert np.array_equal(np.asarray(as_rgb(rgba)), np.asarray(load_image(tmp_path / "clear.png")))
    assert np.asarray(as_rgb(rgba)).min() == 255


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(mode="RGB", size=(60, 40)):
    """A picture that every codec keeps nearly unchanged, (width, height) as PIL has it."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png_header_only(width, height, depth=8, colour=2):
    """A PNG that announces a size and holds no pixels."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_allowed_format_loads_from_file_and_bytes(kind, tmp_path):
    data = encoded(smooth(), kind)
    path = tmp_path / "picture"  # the content decides, not the name
    path.write_bytes(data)
    image = load_image(path)
    assert (image.mode, image_size(image)) == ("RGB", (40, 60))
    assert np.array_equal(to_array(image), to_array(load_image(data)))
    assert np.array_equal(to_array(image), to_array(load_image(str(path))))
    difference = np.abs(to_array(image).astype(int) - np.asarray(smooth()).astype(int))
    assert difference.mean() < (12 if kind == "GIF" else 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(to_array(load_image(encoded(PICTURE, kind, **options))), QUARTERS)


def test_a_multi_picture_jpeg_of_a_phone_gives_its_first_picture():
    data = encoded(smooth(), "MPO", save_all=True, append_images=[smooth("L")])
    assert image_size(load_image(data)) == (40, 60)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_taken(kind):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert to_array(load_image(data)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 63


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_turns_the_picture_upright(orientation, kind):
    """Store the picture as a camera with that orientation does; it must come back upright."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = from_array(undo[orientation](QUARTERS))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(stored, kind, exif=exif, **options)
    image = load_image(data)
    assert image_size(image) == (16, 24)
    assert np.abs(to_array(image).astype(int) - QUARTERS).max() < 20
    # in memory as well, and not once more where it is upright already
    for again in (as_rgb(image), as_rgb(Image.open(io.BytesIO(data)))):
        assert np.array_equal(to_array(again), to_array(image))


def test_unreadable_exif_does_not_spoil_a_sound_picture():
    data = encoded(smooth(), "JPEG", exif=b"Exif\x00\x00not a tiff header")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(load_image(data)) == (40, 60)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_blended_onto_white(mode, alpha):
    image = Image.new("L", (5, 4), 100).convert(mode)
    image.putalpha(alpha)
    expected = round(100 * alpha / 255 + 255 * (1 - alpha / 255))
    assert np.abs(to_array(load_image(encoded(image, "PNG"))).astype(int) - expected).max() <= 1


def test_transparent_palette_and_key_colours_become_white():
    palette = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    palette.putpalette([value for number in range(256) for value in (number, 0, 0)])
    data = encoded(palette, "PNG", transparency=5)
    pixels = to_array(load_image(data)).reshape(-1, 3)
    assert pixels[5].tolist() == [255, 255, 255] and pixels[4].tolist() == [4, 0, 0]
    keyed = encoded(PICTURE, "PNG", transparency=(255, 0, 0))
    assert to_array(load_image(keyed))[0, 0].tolist() == [255, 255, 255]
    assert to_array(load_image(keyed))[0, -1].tolist() == [0, 255, 0]


def test_cmyk_shows_its_colours():
    image = load_image(encoded(PICTURE.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(to_array(image)[2, 2].astype(int) - [255, 0, 0]).max() < 30
    assert np.abs(to_array(image)[12, 20].astype(int) - [255, 255, 255]).max() < 10


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_grey_and_palette_modes_become_rgb(mode):
    image = Image.new(mode, (6, 5))
    assert load_image(encoded(image, "PNG")).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 512).round().astype(np.uint16).reshape(16, 32)
    pixels = to_array(load_image(encoded(Image.fromarray(ramp), kind)))
    assert np.array_equal(pixels[..., 0], np.rint(ramp / 257).astype(np.uint8))
    assert (pixels[..., 0:1] == pixels).all()


def test_sixteen_bits_of_a_dark_picture_stay_dark():
    dark = np.full((4, 4), 2570, dtype=np.uint16)
    assert (to_array(load_image(encoded(Image.fromarray(dark), "PNG"))) == 10).all()


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 512, dtype=np.float32),
        np.linspace(-3, 7e9, 512, dtype=np.float32),
        np.linspace(-(2**31), 2**31 - 1, 512).astype(np.int32),
    ],
    ids=["unit float", "any float", "int32"],
)
def test_wide_values_are_scaled_by_the_range_of_the_image(values):
    image = Image.fromarray(values.reshape(16, 32))
    pixels = to_array(load_image(encoded(image, "TIFF")))[..., 0].reshape(-1).astype(int)
    assert pixels[0] == 0 and pixels[-1] == 255
    assert np.abs(pixels - np.linspace(0, 255, 512)).max() <= 0.51


def test_values_that_are_no_numbers_are_refused():
    values = np.zeros((4, 4), dtype=np.float32)
    values[1, 2] = np.nan
    with pytest.raises(ImageError, match="NaN or infinite"):
        load_image(encoded(Image.fromarray(values), "TIFF"))


def test_a_file_cut_short_is_an_error_where_others_have_told_pillow_to_fill_it(monkeypatch):
    """As lmms-eval does for its whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole, "JPEG")
    assert load_image(whole.getvalue()).size == (64, 64)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        load_image(whole.getvalue()[: len(whole.getvalue()) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
def test_a_file_cut_short_is_an_error_and_never_grey(kind, part):
    data = encoded(smooth(size=(200, 150)), kind)
    with pytest.raises(ImageError):
        load_image(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_even_one_missing_byte_is_noticed(kind):
    data = encoded(smooth(), kind)
    load_image(data)
    with pytest.raises(ImageError):
        load_image(data[:-1])


def test_damaged_files_end_in_an_image_or_an_image_error():
    draw = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = [encoded(smooth(), kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF")]
    samples.append(encoded(smooth(), "JPEG", exif=exif))
    outcomes = {"image": 0, "error": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in samples:
            for _ in range(150):
                damaged = bytearray(data)
                for _ in range(draw.choice([1, 2, 5, 20])):
                    damaged[draw.randrange(min(len(data), draw.choice([60, 400, 9999])))] ^= (
                        1 << draw.randrange(8)
                    )
                try:
                    assert load_image(bytes(damaged)).mode == "RGB"
                    outcomes["image"] += 1
                except ImageError as error:
                    assert "\n" not in str(error)
                    outcomes["error"] += 1
    assert min(outcomes.values()) > 100


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text file", "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (encoded(smooth(), "PPM"), "not an image"),
        (encoded(smooth(), "PDF"), "not an image"),
    ],
)
def test_what_is_no_allowed_image_is_refused_with_a_remedy(data, reason, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(caught.value.remedy)
    assert "\n" not in message and isinstance(caught.value, DataError)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


def test_a_file_name_with_a_line_break_still_gives_one_line(tmp_path):
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a\nb.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 10_000), (20_000, 20_000), (60_000, 60_000)]
)
def test_a_bomb_is_refused_from_its_header(width, height):
    """The file holds no pixels: an attempt to decode it would report a truncated file."""
    with pytest.raises(ImageError, match="pixels"):
        load_image(png_header_only(width, height))
    with pytest.raises(ImageError, match="truncated"):
        load_image(png_header_only(100, 100))


def test_a_real_compressed_bomb_is_refused():
    data = encoded(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(data) < 20_000
    with pytest.raises(ImageError, match="pixels"):
        load_image(data)


def test_limits_are_named_in_the_message():
    data = encoded(smooth(size=(60, 40)), "PNG")
    with pytest.raises(ImageError, match=r"40x60 pixels, above the limit of 2399.*max_pixels"):
        load_image(data, ImageLimits(max_pixels=2399))
    load_image(data, ImageLimits(max_pixels=2400))
    with pytest.raises(ImageError, match=f"{len(data)} bytes, above the limit of 10.*max_bytes"):
        load_image(data, ImageLimits(max_bytes=10))
    thin = encoded(Image.new("RGB", (201, 1)), "PNG")
    assert image_size(load_image(thin)) == (1, 201)
    with pytest.raises(ImageError, match="a side above the limit of 200"):
        load_image(thin, ImageLimits(max_side_px=200))
    with pytest.raises(ImageError, match="longer than 200 to 1"):
        load_image(thin, ImageLimits(max_aspect=200))


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # sparse: takes no space
    with pytest.raises(ImageError, match="3221225472 bytes"):
        load_image(path)


def test_png_round_trip_keeps_every_pixel(tmp_path):
    save_png(QUARTERS, tmp_path / "a.png")
    save_png(PICTURE, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.array_equal(to_array(load_image(tmp_path / "a.png")), QUARTERS)
    assert np.array_equal(to_array(load_image(png_bytes(QUARTERS))), QUARTERS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError):
        save_png(QUARTERS, tmp_path / "taken.png")
    assert [file.name for file in tmp_path.iterdir()] == ["taken.png"]


def test_arrays_of_another_type_or_shape_are_refused():
    for wrong in (QUARTERS.astype(np.float32), QUARTERS[..., 0], QUARTERS[..., :2]):
        with pytest.raises(ValueError, match="expected uint8"):
            from_array(wrong)


def test_sizes_are_height_and_width():
    assert image_size(resize(PICTURE, (5, 9))) == (5, 9)
