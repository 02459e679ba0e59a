"""Pictures of a request: from URLs to bytes with a content key, within limits, off the event loop.

Only headers are read here. Pixels are decoded once, by the encoder, which finds truncated data.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import io
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote_to_bytes

from PIL import Image, UnidentifiedImageError
from pybase64 import b64decode

from epd.errors import EPDError, InvalidImage, InvalidRequest, RequestTooLarge
from proxy.byte_budget import hold
from proxy.media.file import read_file_url
from proxy.media.http import HttpFetcher
from proxy.media.inline import InlinePicture

T = TypeVar("T")

LOW_DETAIL_PIXELS = 512 * 512
"""Bound on the resized picture with `detail: low`."""
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
"""Pillow knows more; some of those run interpreters or are never sent by clients."""
_LOADS_AT_ONCE = 8
"""Pictures of one request that are fetched at the same time."""
_BLANKS = bytes(range(9, 14)) + b" "
_DATA_URL = re.compile(r"data:([^,]*),", re.IGNORECASE)
_PIECE = 1 << 17
"""Characters of base64 that are decoded at once, in a seventh of a millisecond."""


@dataclass(frozen=True)
class ImageSource:
    """A picture as a request names it."""

    url: str
    param: str
    """Where it stands in the request, for errors."""
    low_detail: bool = False


@dataclass(frozen=True)
class LoadedImage:
    """A picture within all limits; its pixels are not decoded yet."""

    data: bytes
    content_key: str
    max_pixels: int | None
    """Bound on the resized picture; None: the processor's own."""
    num_pixels: int
    """Width × height of the original."""
    param: str | None = None
    """Where it stands in the request, for errors that come later."""


@dataclass(frozen=True)
class MediaLimits:
    """What a request may bring."""

    max_image_bytes: int = 20 << 20
    max_image_pixels: int = 64_000_000
    max_images: int = 32
    max_total_bytes: int = 64 << 20
    max_total_pixels: int = 256_000_000


class _Budget:
    """Bytes that the pictures of one request may still have; few load at once, so that it bounds the memory too."""

    def __init__(self, max_bytes: int) -> None:
        self.turn = asyncio.Semaphore(_LOADS_AT_ONCE)
        self._max_bytes = max_bytes
        self._taken = 0

    def take(self, num_bytes: int) -> None:
        self._taken += num_bytes
        if self._taken > self._max_bytes:
            raise RequestTooLarge(
                f"The images have more than {self._max_bytes} bytes together, which is the limit.", param="messages"
            )


class MediaLoader:
    """Loads the pictures of requests.

    Args:
        limits: on bytes, pixels and count.
        fetcher: for http: and https: URLs.
        local_root: folder whose files may be named; None: none may.
    """

    def __init__(self, limits: MediaLimits, fetcher: HttpFetcher, local_root: Path | None) -> None:
        self._limits = limits
        self._fetcher = fetcher
        self._root = local_root
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="media")

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def load(self, sources: Sequence[ImageSource], model: str) -> list[LoadedImage]:
        """All pictures of a request, at the same time, in order.

        Args:
            sources: where they are.
            model: fingerprint of the checkpoint, part of the content keys.

        Raises:
            InvalidRequest, InvalidImage: malformed URL, or the bytes are no picture.
            RequestTooLarge: too many, too large, or too large together.
            Overloaded: all requests together hold too much.
            MediaForbidden, MediaUnavailable: it may not, or can't, be fetched.
        """
        if not sources:
            return []
        if len(sources) > self._limits.max_images:
            raise RequestTooLarge(
                f"{len(sources)} images in one request; at most {self._limits.max_images}.", param="messages"
            )
        budget = _Budget(self._limits.max_total_bytes)
        tasks = [asyncio.create_task(self._load_one(source, budget, model)) for source in sources]
        try:
            images = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._check_total_pixels(images)
        return images

    def _check_total_pixels(self, images: Sequence[LoadedImage]) -> None:
        total_pixels = sum(image.num_pixels for image in images)
        if total_pixels > self._limits.max_total_pixels:
            raise RequestTooLarge(
                f"The images have {total_pixels} pixels together; at most {self._limits.max_total_pixels}.",
                param="messages",
            )

    async def _load_one(self, source: ImageSource, budget: _Budget, model: str) -> LoadedImage:
        try:
            async with budget.turn:
                data = await self._read(source.url)
            budget.take(len(data))
            return await self._in_thread(lambda: self._inspect(data, source, model))
        except EPDError as error:
            error.param = error.param or source.param
            raise

    async def _read(self, url: str) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return await self._fetcher.fetch(url.strip(), hold)  # hosts may be slow, so as the bytes come
        if scheme == "data":
            data = await self._in_thread(lambda: parse_data_url(url, self._limits.max_image_bytes))
        elif scheme == "file":
            data = await self._in_thread(lambda: read_file_url(url, self._root, self._limits.max_image_bytes))
        else:
            raise InvalidRequest("Image URLs start with data:, http:, https: or file:.")
        hold(len(data))
        return data

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _inspect(self, data: bytes, source: ImageSource, model: str) -> LoadedImage:
        pixels = count_pixels(data, self._limits.max_image_pixels)
        bound = LOW_DETAIL_PIXELS if source.low_detail else None
        return LoadedImage(data, content_key(model, bound, data), bound, pixels, source.param)


def content_key(model: str, max_pixels: int | None, data: bytes) -> str:
    """What embeddings depend on, as 32 hex digits: model, processor settings, bytes."""
    digest = hashlib.blake2b(f"{model}\0{max_pixels}\0".encode(), digest_size=16)
    digest.update(data)
    return digest.hexdigest()


def parse_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a data: URL (RFC 2397), base64 or percent-encoded. Its MIME type is not believed.

    Raises:
        InvalidImage: malformed.
        RequestTooLarge: more than `max_bytes`.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise InvalidImage("The data: URL has no comma; write data:image/png;base64,<data>.")
    is_base64 = head[1].rpartition(";")[2].strip().lower() == "base64"
    # Nine bytes can't make less than one, whichever way they are written.
    if len(url) - head.end() > 9 * max_bytes:
        raise RequestTooLarge(f"The image is larger than {max_bytes} bytes.")
    if is_base64 and isinstance(url, InlinePicture) and url.name == url[head.end() :]:
        data = url.data()
    elif is_base64 and "%" not in url:
        data = _strict_base64(url[at : at + _PIECE].encode("utf-8", "replace") for at in _places(url, head.end()))
    elif is_base64:
        text = unquote_to_bytes(url[head.end() :])
        data = _strict_base64(text[at : at + _PIECE] for at in _places(text))
    else:
        data = unquote_to_bytes(url[head.end() :])
    if not data:
        raise InvalidImage("The data: URL is empty.")
    if len(data) > max_bytes:
        raise RequestTooLarge(f"The image is larger than {max_bytes} bytes.")
    return data


def _places(text: str | bytes, start: int = 0) -> range:
    """Where its pieces begin."""
    return range(start, len(text), _PIECE)


def _strict_base64(pieces: Iterable[bytes]) -> bytes:
    """Python's lenient decoder skips what it does not know and returns something else than was meant.

    Takes small pieces, after each of which other threads get their turn: as one call it would stop all streams.
    """
    decoded: list[bytes] = []
    left, is_over = b"", False
    for piece in pieces:
        text = left + piece.translate(None, _BLANKS)
        end = len(text) - len(text) % 4
        text, left = text[:end], text[end:]
        if text and is_over:
            raise _no_base64()
        try:
            decoded.append(b64decode(text, validate=True))
        except ValueError as error:
            raise _no_base64() from error
        is_over = is_over or text.endswith(b"=")
        time.sleep(0)
    if left:
        raise _no_base64()
    return b"".join(decoded)


def _no_base64() -> InvalidImage:
    return InvalidImage(
        "The image is not valid base64: use the standard alphabet (+ and /) with = padding, nothing else."
    )


def count_pixels(data: bytes, max_pixels: int) -> int:
    """Width × height from the picture's header.

    Raises:
        InvalidImage: no picture of a known format.
        RequestTooLarge: more than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise RequestTooLarge(f"The image has too many pixels; at most {max_pixels}.") from None
    except UnidentifiedImageError:
        raise InvalidImage(_explain(data)) from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, RuntimeError) as error:
        # Format plug-ins raise whatever they stumble over in a broken header; AVIF's raises RuntimeError.
        raise InvalidImage(f"The image is broken: {type(error).__name__}.") from error
    if width * height > max_pixels:
        raise RequestTooLarge(f"The image has {width} × {height} pixels; at most {max_pixels}.")
    return width * height


@functools.cache
def _known_formats() -> list[str]:
    """Those of `_FORMATS` that this build of Pillow has."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _explain(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if not data:
        return "The image is empty."
    if b"<svg" in start:
        return "The image is an SVG; send a raster format such as PNG or JPEG."
    if start.startswith(b"<"):
        return "The image is a web page or XML, not a picture; check the URL."
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "The image is HEIC, which is not supported; send JPEG or PNG."
    return f"The bytes are no image of a known format ({', '.join(_FORMATS)})."
