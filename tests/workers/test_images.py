"""Every kind of file that a client may call an image, made in memory."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image, ImageFile

from epd.errors import ClientError, ConfigError, InvalidImage, RequestTooLarge
from workers.images import ImageLimits, decode_image

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def photo(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Noise: nothing that compresses to a handful of bytes, so that files can be cut anywhere."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def near(pixel: object, want: tuple[int, int, int], tolerance: int = 6) -> bool:
    assert isinstance(pixel, tuple)
    return len(pixel) == 3 and all(abs(a - b) <= tolerance for a, b in zip(pixel, want, strict=True))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size, with valid checksums, and holds one line of nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


# -- what works ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG"])
def test_each_accepted_format_decodes_to_rgb(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {"quality": 100}
    image = decode_image(file_of(Image.new("RGB", (40, 30), RED), format, **options))
    assert image.mode == "RGB"
    assert image.size == (40, 30)
    assert near(image.getpixel((20, 15)), RED)


def test_pixels_of_a_lossless_file_are_exact_and_a_memoryview_is_taken() -> None:
    picture = photo()
    assert decode_image(memoryview(file_of(picture, "PNG"))).tobytes() == picture.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    """Stored so that viewers show: 24 wide, 16 high, top left quarter red, top right green, bottom left blue."""
    shown = Image.new("RGB", (24, 16), WHITE)
    shown.paste(RED, (0, 0, 12, 8))
    shown.paste(GREEN, (12, 0, 24, 8))
    shown.paste(BLUE, (0, 8, 12, 16))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = shown if undo is None else shown.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    if format == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    image = decode_image(file_of(stored, format, exif=exif, **options))
    assert image.size == (24, 16)
    corners = [image.getpixel(at) for at in ((3, 3), (20, 3), (3, 13), (20, 13))]
    assert all(near(pixel, want) for pixel, want in zip(corners, (RED, GREEN, BLUE, WHITE), strict=True)), corners


def test_orientation_of_no_meaning_and_damaged_exif_leave_the_picture_as_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 42
    assert decode_image(file_of(photo(24, 16), "JPEG", exif=exif)).size == (24, 16)
    assert decode_image(file_of(photo(24, 16), "JPEG", exif=b"Exif\0\0nonsense")).size == (24, 16)


def transparent(mode: str) -> Image.Image:
    """Left half transparent over black, right half opaque red (grey in LA)."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (4, 0, 8, 4))
    return image.convert(mode)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_composited_on_white(format: str) -> None:
    image = decode_image(file_of(transparent("RGBA"), format, **({"lossless": True} if format == "WEBP" else {})))
    assert image.getpixel((0, 0)) == WHITE
    assert image.getpixel((6, 2)) == RED


def test_half_transparent_black_is_grey() -> None:
    pixel = decode_image(file_of(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")).getpixel((0, 0))
    assert near(pixel, (127, 127, 127), 1)


def test_grey_with_alpha_is_composited_on_white() -> None:
    image = decode_image(file_of(transparent("LA"), "PNG"))
    assert image.getpixel((0, 0)) == WHITE
    assert near(image.getpixel((6, 2)), (76, 76, 76), 1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(format: str) -> None:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (4, 0, 8, 4))
    decoded = decode_image(file_of(image, format, transparency=0))
    assert decoded.getpixel((0, 0)) == WHITE
    assert decoded.getpixel((6, 2)) == RED


def test_a_palette_with_an_alpha_channel_is_white_where_transparent() -> None:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (4, 0, 8, 4))
    decoded = decode_image(file_of(image, "PNG", transparency=bytes([0, 255])))  # tRNS: one alpha per entry
    assert decoded.getpixel((0, 0)) == WHITE
    assert decoded.getpixel((6, 2)) == RED


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (0, 0, 0)), ("L", 0)])
def test_a_transparent_colour_key_is_white(mode: str, colour: Any) -> None:
    image = Image.new(mode, (4, 4), colour)
    assert decode_image(file_of(image, "PNG", transparency=colour)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    ramp = Image.frombytes("I;16", (256, 1), b"".join(struct.pack("<H", 257 * x) for x in range(256)))
    image = decode_image(file_of(ramp.resize((256, 4), Image.Resampling.NEAREST), format))
    assert [image.getpixel((x, 0)) for x in range(256)] == [(x, x, x) for x in range(256)]


def test_16_bit_grey_is_not_stretched_when_it_is_dark() -> None:
    dark = Image.frombytes("I;16", (2, 2), struct.pack("<4H", 0, 0, 257, 257))
    assert decode_image(file_of(dark, "PNG")).getpixel((0, 1)) == (1, 1, 1)


def test_32_bit_grey_is_scaled() -> None:
    wide = Image.new("I", (2, 1))
    wide.putpixel((1, 0), 2**31 - 1)
    image = decode_image(file_of(wide, "TIFF"))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [BLACK, WHITE]


@pytest.mark.parametrize(("ink", "want"), [((0, 255, 255, 0), RED), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), BLACK)])
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_converted(format: str, ink: tuple[int, ...], want: tuple[int, int, int]) -> None:
    image = decode_image(file_of(Image.new("CMYK", (16, 16), ink), format))
    assert near(image.getpixel((8, 8)), want)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_1_bit_is_black_and_white(format: str) -> None:
    image = Image.new("1", (8, 4), 0)
    image.paste(1, (4, 0, 8, 4))
    decoded = decode_image(file_of(image, format))
    assert decoded.getpixel((0, 0)) == BLACK
    assert decoded.getpixel((6, 2)) == WHITE


def test_grey_and_ycbcr_are_converted() -> None:
    assert decode_image(file_of(Image.new("L", (8, 8), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    ycbcr = Image.new("RGB", (8, 8), RED).convert("YCbCr")
    assert near(decode_image(file_of(ycbcr, "TIFF")).getpixel((0, 0)), RED)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_an_animation_is_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (16, 12), colour) for colour in (RED, GREEN, BLUE)]
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
    image = decode_image(data)
    assert image.size == (16, 12)
    assert near(image.getpixel((8, 6)), RED)


def test_a_multi_picture_jpeg_is_its_first_picture() -> None:
    data = file_of(Image.new("RGB", (16, 16), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert near(decode_image(data).getpixel((8, 8)), RED)


def test_the_mime_label_does_not_matter_the_bytes_do() -> None:
    assert decode_image(file_of(photo(), "PNG") + b"trailing rubbish").size == (64, 48)


def test_extreme_but_legal_sizes() -> None:
    assert decode_image(file_of(Image.new("RGB", (1, 1), RED), "PNG")).size == (1, 1)
    assert decode_image(file_of(Image.new("RGB", (200, 1), RED), "PNG")).size == (200, 1)


def test_threads_do_not_disturb_each_other() -> None:
    pictures = [photo(50 + i, 40, seed=i) for i in range(16)]
    files = [file_of(picture, "PNG") for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(decode_image, files * 4))
    assert [image.tobytes() for image in decoded] == [picture.tobytes() for picture in pictures] * 4


# -- what is refused -----------------------------------------------------------------------------------------------


def refusal(data: bytes, **limits: Any) -> str:
    with pytest.raises(InvalidImage) as caught:
        decode_image(data, ImageLimits(**limits))
    assert "0x" not in caught.value.message  # no addresses of objects
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_file_is_refused(format: str, kept: float) -> None:
    data = file_of(photo(), format)
    assert format in refusal(data[: int(len(data) * kept)]).upper()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(("format", "shown"), [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "WebP"), ("GIF", "GIF")])
def test_a_file_cut_inside_its_header_is_refused_by_name(format: str, shown: str) -> None:
    assert shown in refusal(file_of(photo(), format)[:12])


def test_a_damaged_png_chunk_is_refused() -> None:
    data = bytearray(file_of(photo(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert "PNG" in refusal(bytes(data))


@pytest.mark.parametrize(("width", "height"), [(14000, 14000), (10_000, 10_000), (65535, 65535), (9000, 7200)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    """Below, between and above Pillow's own two bounds."""
    with pytest.raises(RequestTooLarge, match=f"{width * height:,} pixels; at most 64,000,000"):
        decode_image(png_header(width, height))


def test_the_limit_is_configurable_and_exact() -> None:
    data = file_of(photo(64, 48), "PNG")
    assert decode_image(data, ImageLimits(max_pixels=64 * 48)).size == (64, 48)
    with pytest.raises(RequestTooLarge, match="64×48 = 3,072 pixels; at most 3,071"):
        decode_image(data, ImageLimits(max_pixels=64 * 48 - 1))


@pytest.mark.parametrize("max_pixels", [0, 178_956_971])
def test_a_limit_that_could_not_be_kept_is_a_config_error(max_pixels: int) -> None:
    with pytest.raises(ConfigError, match="--max-image-pixels"):
        ImageLimits(max_pixels=max_pixels)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (201, 1), (10_000, 49)])
def test_an_elongated_picture_is_refused_with_the_limit(size: tuple[int, int]) -> None:
    message = refusal(file_of(Image.new("RGB", size), "PNG"))
    assert "aspect ratio" in message
    assert "at most 200" in message


def test_html_svg_and_json_are_recognised() -> None:
    assert "HTML page instead" in refusal(b"\n<!DOCTYPE html>\n<html><body>404</body></html>")
    assert "HTML page instead" in refusal(b"<html><head>")
    assert "SVG" in refusal(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    assert "SVG" in refusal(b'<svg width="1">')
    assert "JSON instead" in refusal(b'{"error": "not found"}')


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"\0\0\0\x20ftypisom", "MP4"),
    ],
)
def test_unsupported_formats_are_named(head: bytes, name: str) -> None:
    assert f"{name} " in refusal(head + bytes(64))


def test_formats_that_pillow_knows_but_we_do_not_accept_are_refused() -> None:
    assert "PNM" in refusal(file_of(photo(), "PPM"))
    assert "ICO" in refusal(file_of(photo(), "ICO"))
    assert "JPEG 2000" in refusal(file_of(photo(), "JPEG2000"))
    assert "PostScript" in refusal(file_of(photo(), "EPS"))


def test_empty_and_random_bytes_are_refused() -> None:
    assert "empty" in refusal(b"")
    assert "no known image format" in refusal(b"hello")
    assert "no known image format" in refusal(random.Random(1).randbytes(4096))


def test_floating_point_pixels_are_refused() -> None:
    assert "floating-point" in refusal(file_of(Image.new("F", (4, 4), 0.5), "TIFF"))


SOURCES: list[tuple[str, Callable[[], bytes]]] = [
    ("png", lambda: file_of(photo(24, 16), "PNG")),
    ("jpeg", lambda: file_of(photo(24, 16), "JPEG")),
    ("gif", lambda: file_of(photo(24, 16), "GIF")),
    ("webp", lambda: file_of(photo(24, 16), "WEBP")),
    ("bmp", lambda: file_of(photo(24, 16), "BMP")),
    ("tiff", lambda: file_of(photo(24, 16), "TIFF", compression="tiff_lzw")),
    ("avif", lambda: file_of(photo(24, 16), "AVIF")),
    ("palette", lambda: file_of(photo(24, 16).convert("P"), "PNG", transparency=3)),
]


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged metadata; here warnings would become errors.
@pytest.mark.parametrize(("name", "make"), SOURCES)
def test_damage_gives_a_picture_or_a_client_error_never_anything_else(name: str, make: Callable[[], bytes]) -> None:
    rng = random.Random(name)
    original = make()
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            image = decode_image(bytes(data), ImageLimits(max_pixels=1_000_000))
        except ClientError:
            continue
        assert image.mode == "RGB"
        assert image.width * image.height <= 1_000_000
