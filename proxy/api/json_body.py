"""JSON bodies to structs, within bounds, and what is wrong with them in words that name the field."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from epd.errors import InvalidJSON, InvalidRequest, RequestTooLarge
from proxy.api.large_body import LargeBody

T = TypeVar("T")

Body = bytes | bytearray | LargeBody
"""Of a request."""
_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_BYTE = re.compile(r"(?<=\(byte )\d+(?=\))")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")
_MAX_TEXTS_AND_CONTAINERS = 1 << 20
_MAX_ITEMS = 1 << 23
"""A body with more is hundreds of megabytes of objects once it is decoded, which takes seconds in which nothing else
happens. No model has context for so much: numbers are cheaper, and many texts may come as tokens."""
_FEW = 1000
_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}
"""Kept, because making one takes longer than decoding."""


def decode_body(body: Body, kind: type[T]) -> T:
    """The request in `body`. Of a key that comes twice the last one counts, as with most readers of JSON.

    Raises:
        RequestTooLarge: it is made of more parts than anybody has use for.
        InvalidJSON: not JSON, as which NaN, Infinity and lone surrogates do not count.
        InvalidRequest: a field of the wrong type or range.
    """
    if isinstance(body, LargeBody):
        request = decode_keys(body, kind)
        return request if body.hand_out(request) else decode_body(body.restored(), kind)
    _check_parts(body)
    try:
        if kind not in _decoders:
            _decoders[kind] = msgspec.json.Decoder(kind)
        return _decoders[kind].decode(body)  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJSON(
            f"The body is not valid JSON in UTF-8 ({error}); NaN, Infinity and lone surrogates are not JSON."
        ) from error


def decode_keys(body: Body, kind: type[T]) -> T:
    """`decode_body` where it matters which keys are there: what stands in the fields of pictures means nothing."""
    if not isinstance(body, LargeBody):
        return decode_body(body, kind)
    try:
        return decode_body(body.json, kind)
    except InvalidJSON as error:
        raise InvalidJSON(_BYTE.sub(lambda at: str(body.place(int(at[0]))), error.message)) from error


def _field_error(text: str) -> InvalidRequest:
    match = _AT.match(text)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    missing = _MISSING.search(what)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
    where = f"{path}: " if path else "The body: "
    return InvalidRequest(f"{where}{what[:1].lower()}{what[1:]}.", param=path or None)


def _check_parts(body: bytes | bytearray) -> None:
    """Counting bytes is far cheaper than making objects of them; those within texts count too."""
    if len(body) <= _MAX_TEXTS_AND_CONTAINERS:
        return
    if _count(body, b'"') // 2 + _count(body, b"[") + _count(body, b"{") > _MAX_TEXTS_AND_CONTAINERS:
        raise RequestTooLarge(
            f"The body holds more than {_MAX_TEXTS_AND_CONTAINERS} texts, lists and objects; send it in parts."
        )
    if _count(body, b",") > _MAX_ITEMS:
        raise RequestTooLarge(f"The body holds more than {_MAX_ITEMS} items; send it in parts.")


def _count(body: bytes | bytearray, byte: bytes) -> int:
    """`body.count(byte)`, which looks at each byte where `find` leaps: pictures are long and have none of these."""
    at = -1
    for found in range(_FEW):
        at = body.find(byte, at + 1)
        if at < 0:
            return found
    return body.count(byte)
