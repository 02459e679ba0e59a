"""What a parser tells of an answer that may hold tool calls, and the names that calls are given."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from dataclasses import dataclass

_ALPHANUMERICS = string.ascii_letters + string.digits
_SHORT = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True)
class CallDelta:
    """News of one call. `id` and `name` come once, with the first."""

    index: int
    """Its place among the calls of the answer: 0, 1, …"""
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """What is new of the JSON text of the arguments."""


@dataclass(frozen=True)
class CallClosed:
    """A call is whole."""

    index: int


@dataclass(frozen=True)
class CallBroken:
    """What clients were told as a call never became a whole one."""

    index: int
    text: str
    """All that the model wrote for it."""


Piece = str | CallDelta | CallClosed | CallBroken
"""Text that is content, or news of a call."""


@dataclass(frozen=True)
class ToolCall:
    """A whole call of an answer."""

    id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


def new_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def new_short_id() -> str:
    """Nine letters and digits: templates of the Mistral family take no others."""
    return "".join(secrets.choice(_ALPHANUMERICS) for _ in range(9))


def short_id(call_id: str) -> str:
    """The same call's id where only nine letters and digits will do; equal ids stay equal."""
    if _SHORT.fullmatch(call_id):
        return call_id
    number = int.from_bytes(hashlib.blake2b(call_id.encode(), digest_size=8).digest(), "big")
    letters = []
    for _ in range(9):
        number, place = divmod(number, len(_ALPHANUMERICS))
        letters.append(_ALPHANUMERICS[place])
    return "".join(letters)
