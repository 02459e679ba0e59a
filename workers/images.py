"""Image bytes to RGB pixels: the one place where a picture's file format is dealt with.

What the proxy forwards is the client's original file, hostile until proven otherwise. The size in its header is
checked before a pixel is decoded; then orientation, transparency, bit depth and colour model are normalised, once,
so that token counts and embeddings are made of the same pixels. Only Pillow is needed here.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError, features

from epd.errors import ConfigError, InvalidImage, RequestTooLarge

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""All that is decoded. Pillow knows some fifty more; each of them is a parser that strangers could reach."""

_BROKEN_FILE = (
    OSError,  # truncated, UnidentifiedImageError, codec errors
    SyntaxError,  # damaged PNG chunks, TIFF directories
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on damaged files. None of it is our failure: the same bytes would fail again."""

_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the picture upright; 1 is upright already."""


_PILLOWS_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Above it Pillow refuses by itself, for the whole process."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Bounds of what is decoded."""

    max_pixels: int = 64_000_000
    """Width × height, checked against the header. A decoded pixel takes 3 to 4 bytes, some copies more for a moment."""
    max_aspect_ratio: float = 200.0
    """Longer side ÷ shorter side; the Qwen image processors refuse more."""

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= _PILLOWS_MAX_PIXELS:
            raise ConfigError(f"--max-image-pixels {self.max_pixels}: want 1 to {_PILLOWS_MAX_PIXELS}")


def decode_image(data: bytes | memoryview, limits: ImageLimits | None = None) -> Image.Image:
    """The first frame of an image file: upright, on white, mode RGB.

    Safe to call from several threads at once.

    Raises:
        RequestTooLarge: the header announces more pixels than allowed; nothing has been decoded.
        InvalidImage: the file is no picture, of an unsupported kind, damaged, or too elongated.
    """
    limits = limits or ImageLimits()
    if not len(data):
        raise InvalidImage("The image is empty (0 bytes).")
    image = _open(data, limits)
    try:
        _check_size(image.size, limits)
        return _decode(image)
    except _BOMB as error:
        raise _too_large(error, limits) from error
    except _BROKEN_FILE as error:
        raise InvalidImage(f"The {image.format} image can't be decoded: {_reason(error)}") from error


def _open(data: bytes | memoryview, limits: ImageLimits) -> Image.Image:
    """Read the header; pixels stay undecoded."""
    try:
        return Image.open(io.BytesIO(data), formats=_available_formats())
    except _BOMB as error:
        raise _too_large(error, limits) from error
    except UnidentifiedImageError as error:
        raise InvalidImage(_what_it_is(bytes(data[:1024]))) from error
    except _BROKEN_FILE as error:
        raise InvalidImage(f"The {_kind(data)}image can't be read: {_reason(error)}") from error


def _available_formats() -> tuple[str, ...]:
    return _FORMATS if features.check("avif") else tuple(name for name in _FORMATS if name != "AVIF")


def _too_large(error: Exception, limits: ImageLimits) -> RequestTooLarge:
    """Pillow has its own bound, some 179 million pixels, and keeps the numbers in its message only."""
    declared = re.search(r"\d+", str(error))
    pixels = f"{int(declared[0]):,}" if declared else "too many"
    return RequestTooLarge(f"The image has {pixels} pixels; at most {limits.max_pixels:,} are accepted.")


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if min(size) < 1:
        raise InvalidImage(f"The image is empty ({width}×{height} pixels).")
    if width * height > limits.max_pixels:
        raise RequestTooLarge(
            f"The image has {width}×{height} = {width * height:,} pixels; at most {limits.max_pixels:,} are accepted."
        )
    if max(size) > limits.max_aspect_ratio * min(size):
        raise InvalidImage(
            f"The image is too elongated: {width}×{height} pixels is an aspect ratio of "
            f"{max(size) / min(size):.0f}, at most {limits.max_aspect_ratio:g} is accepted."
        )


def _decode(image: Image.Image) -> Image.Image:
    # A picture opens at its first frame, and only that one is decoded, however many there are.
    image.load()
    # After load(): some formats keep their EXIF data behind the pixels.
    turn = _turn(image)
    image = _to_rgb(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _BROKEN_FILE:
        return None  # Damaged metadata: the pixels are fine, and viewers show them unturned too.
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise InvalidImage("Pixels are floating-point numbers of unknown range; convert the image to 8 or 16 bits.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit (or wider) grey to 8 bits; plain `convert` would clip, that is, turn it white."""
    wide = image if image.mode == "I" else image.convert("I")
    _, brightest = wide.getextrema()
    # Mode I holds 16-bit PNG and TIFF as well as signed 32-bit TIFF; files don't say which, values do.
    full_scale = 65535 if float(str(brightest)) <= 65535 else 2**31 - 1
    # A linear function is all that Pillow's `point` offers for this mode; it truncates, hence the half.
    return wide.point(lambda value: value * (255 / full_scale) + 0.5).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white, as image viewers do. Plain `convert` shows what transparent pixels hide, mostly black."""
    with_alpha = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, with_alpha).convert("RGB")


# -- telling the client what was sent instead of a picture -----------------------------------------------------------

_ACCEPTED = "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF are accepted."

_MARKUP: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"<svg[\s>]", re.I),
        f"The image is an SVG drawing; convert it to pixels first. {_ACCEPTED}",
    ),
    (
        re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.I),
        "Got an HTML page instead of an image. Does the URL lead to the image itself, not to a page that shows it, "
        "a login or an error?",
    ),
    (re.compile(rb"^\s*[{\[]\s*[\"{\[]"), "Got JSON instead of an image. Did the URL answer with an error?"),
)

_SIGNATURES: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"^.{4}ftyp(hei[a-z]|hev[a-z]|mif1|msf1)", re.S), "HEIC"),
    (re.compile(rb"^.{4}ftypavi[fs]", re.S), "AVIF"),
    (re.compile(rb"^.{4}ftyp", re.S), "MP4 video"),
    (re.compile(rb"^(\xff\x0a|\0\0\0\x0cJXL )"), "JPEG XL"),
    (re.compile(rb"^(\0\0\0\x0cjP  |\xff\x4f\xff\x51)"), "JPEG 2000"),
    (re.compile(rb"^\0\0[\1\2]\0"), "ICO"),
    (re.compile(rb"^icns"), "ICNS"),
    (re.compile(rb"^8BPS"), "Photoshop"),
    (re.compile(rb"^%PDF"), "PDF"),
    (re.compile(rb"^%!PS"), "PostScript"),
    (re.compile(rb"^P[1-7]\s"), "PNM"),
    (re.compile(rb"^#\?RADIANCE"), "Radiance HDR"),
    (re.compile(rb"^v/1\x01"), "OpenEXR"),
    (re.compile(rb"^\x1a\x45\xdf\xa3"), "Matroska or WebM video"),
    (re.compile(rb"^PK\x03\x04"), "ZIP"),
    (re.compile(rb"^\x1f\x8b"), "gzip"),
)
"""Start of a file → name, for the formats that people send and that are not decoded."""

_ACCEPTED_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)


def _what_it_is(head: bytes) -> str:
    """The message for bytes that no decoder takes."""
    for pattern, message in _MARKUP:
        if pattern.search(head):
            return message
    for pattern, name in _SIGNATURES:
        if pattern.search(head):
            return f"The {name} format is not supported. {_ACCEPTED}"
    if kind := _kind(head):
        return f"The {kind}image is damaged or truncated: its header can't be read."
    return f"The bytes are no known image format. {_ACCEPTED}"


def _kind(data: bytes | memoryview) -> str:
    """Name of an accepted format by the file's first bytes, with a space behind it; empty for other files."""
    head = bytes(data[:4])
    return next((f"{name} " for signature, name in _ACCEPTED_SIGNATURES if head.startswith(signature)), "")


def _reason(error: Exception) -> str:
    """Pillow's words, without what means nothing to a client (addresses of objects) and cut to a line."""
    words = re.sub(r"<[^>]*>", "", str(error)).strip() or type(error).__name__
    return words.splitlines()[0][:200]
