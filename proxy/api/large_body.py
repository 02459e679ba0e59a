r"""Large bodies: pictures in base64 become bytes as they arrive, and in the JSON a name stands in their place.

    {"url": "data:image/png;base64,iVBORw0KGgo…"}  →  {"url": "data:image/png;base64,5f0c…"} and the bytes of 5f0c…

Decoding the JSON of 60 MiB stops all streams for a tenth of a second, because it is one call, and most of that is spent
on memory for texts that are needed as bytes. Here a piece of 64 KiB costs ten microseconds.

Any JSON reader sees the same in both: what is taken out has nothing but the letters of base64 (and `\/`, which is `/`),
begins behind a quote or `;base64,` and ends before a quote. If the first quote opens a string, its text is shorter now;
if it closes one, neither is JSON. And only a field of pictures may hold a name: wherever else one is found, or is lost,
the body is put back as it was (`restored`).
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from msgspec import Struct
from pybase64 import b64decode, b64encode

from proxy.media.inline import InlinePicture

_LONG = 1 << 16
"""Letters from which on a text may be taken out; and so many are decoded at once."""
_MAX_ITEMS = 1 << 14
"""Parts of a request among which pictures are looked for. Looking takes a millisecond for a thousand."""
_FIELDS = frozenset({"url", "image_url", "data", "image_data"})
"""Those that hold pictures, in all dialects, and of those with a type nothing else."""
_NAME_LETTERS = 40
_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


class LargeBody:
    """JSON with names of pictures, and the pictures. `add` all pieces, then `finish`."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes that came."""
        self.json = bytearray()
        """Grows in place: to join pieces at the end would stop all streams."""
        self._pictures: dict[str, _LongText] = {}
        """By names that no client can know."""
        self._seen = 0
        """So far no long text begins in the JSON."""
        self._long: _LongText | None = None
        """That which comes in."""

    def add(self, piece: bytes) -> None:
        """What came next."""
        self.size += len(piece)
        for start in range(0, len(piece), _LONG):  # so that a picture's beginning and end are not in the same one
            self._add(piece[start : start + _LONG])

    def _add(self, piece: bytes) -> None:
        if self._long is not None:
            piece = self._go_on(self._long, piece)
        self.json += piece
        if len(self.json) - self._seen >= _LONG:
            self._look()

    def finish(self) -> LargeBody | bytearray:
        """Nothing comes any more. Returns the JSON alone where no picture was taken out."""
        if self._long is not None:
            self._long.append_to(self.json)
        return self if self._pictures else self.json

    def restored(self) -> bytearray:
        r"""All as it came, but for `\/`."""
        body, end = bytearray(), 0
        for picture in self._pictures.values():  # in order
            body += self.json[end : picture.at]
            picture.append_to(body)
            end = picture.at + _NAME_LETTERS
        body += self.json[end:]
        return body

    def place(self, at: int) -> int:
        """Where in the body stood what stands there in the JSON."""
        before = [picture for picture in self._pictures.values() if picture.at + _NAME_LETTERS <= at]
        return at + sum(picture.size - _NAME_LETTERS for picture in before)

    def hand_out(self, request: Any) -> bool:
        """Put the pictures into the fields where their names are.

        Args:
            request: decoded from `json`. Modified.

        Returns:
            Whether each has found one place. Otherwise the request is of no use.
        """
        left, todo, found = self._pictures.copy(), [request], 0
        for one in todo:  # which grows
            for field in one.__struct_fields__:
                value = getattr(one, field)
                if isinstance(value, str) and field in _FIELDS:
                    setattr(one, field, self._picture(value, left))
                elif isinstance(value, Struct):
                    todo.append(value)
                elif isinstance(value, list):
                    found += len(value)
                    if found > _MAX_ITEMS:
                        return False
                    todo += [item for item in value if isinstance(item, Struct)]
                    if field in _FIELDS:
                        value[:] = [self._picture(item, left) for item in value]
        return not left

    def _picture(self, value: Any, left: dict[str, _LongText]) -> Any:
        """The picture that a value names, which is `left` no more; other values as they are."""
        name = value[-_NAME_LETTERS:] if isinstance(value, str) else ""
        if name not in left or not (value == name or _URL.fullmatch(value[:-_NAME_LETTERS])):
            return value
        return InlinePicture(value, name, left.pop(name).pieces)

    # -- long texts ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Take out what the JSON ends with, if that is a long text."""
        json = self.json
        start = max(json.rfind(b'"', self._seen), json.rfind(b",", self._seen), self._seen - 1) + 1
        self._seen = start
        if len(json) - start < _LONG:
            return  # it may become one
        self._seen = len(json)
        if not json.endswith((b'"', b";base64,"), 0, start):
            return
        long = _LongText()
        try:
            long.add(json[start:])
        except ValueError:
            return
        del json[start:]
        self._long = long

    def _go_on(self, long: _LongText, piece: bytes) -> bytes:
        """Go on with the text that comes in. Returns the part of the piece that is behind it."""
        end = piece.find(b'"')
        try:
            if end < 0:
                long.add(piece)
                return b""
            long.add(piece[:end])
            long.finish()
        except ValueError:  # then it stays
            long.append_to(self.json)
        else:
            name = secrets.token_hex(_NAME_LETTERS // 2)
            self._pictures[name] = long
            long.at = len(self.json)  # and there it stays: the JSON is cut off behind it only
            self.json += name.encode()
        self._long, self._seen = None, len(self.json)
        return b"" if end < 0 else piece[end:]


class _LongText:
    """Base64 that comes in. Whatever raises ValueError, because it is none, has taken all that it was given."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes that came."""
        self.at = 0
        """Where its name stands in the JSON, once it has one."""
        self.pieces: list[bytes] = []
        """Decoded."""
        self._left = bytearray()
        """Not yet. Among it is always the end, where padding may be, or half of what is escaped."""

    def add(self, text: bytes | bytearray) -> None:
        self.size += len(text)
        self._left += text
        if len(self._left) >= _LONG:
            self._decode()

    def finish(self) -> None:
        self._decode()
        last = b64decode(self._left, validate=True)
        if b64encode(last) != self._left:  # the same bytes may be written in several ways
            raise ValueError("not as we would write it")
        self.pieces.append(last)
        self._left.clear()

    def append_to(self, body: bytearray) -> None:
        r"""Append all as it came, but for `\/`: the pieces are threes of bytes, except for the last one."""
        for piece in self.pieces:
            body += b64encode(piece)
        body += self._left

    def _decode(self) -> None:
        text = self._left
        if b"\\" in text:
            if rb"\\" in text:  # a backslash, and what follows is not escaped
                raise ValueError("a letter that base64 does not have")
            text = text.replace(rb"\/", b"/")
        end = max(len(text) - 1, 0) // 4 * 4
        if b"=" in text[:end]:
            raise ValueError("padding is not at the end")
        self.pieces.append(b64decode(text[:end], validate=True))
        self._left = text[end:]
