"""JSON that comes in pieces: where a value ends, and what a call among it says, before all of it is there.

Brackets and strings decide where a value ends, never punctuation alone: `;`, `]` and `</tool_call>` may stand in a
string. What can't be JSON (a letter that begins no value, a bracket that closes another kind) breaks it at once, so
that a model that forgot a brace does not swallow the rest of its answer.
"""

from __future__ import annotations

import json
import re
from typing import Protocol

BLANKS = " \t\r\n"
_PLAIN = re.compile(r"[\s\d+\-.eEtrufalsn:,]*")
"""What may stand between brackets and strings: numbers, true, false, null, colons, commas."""
_LITERAL = re.compile(r"[\w+\-.]*")
_STRING_EVENT = re.compile(r'["\\]')
_CONTROL = re.compile(r"[\x00-\x1f]")
_CLOSES = {"}": "{", "]": "["}


class JSONValue:
    """One JSON value in pieces. Knows its end; its inside is checked as far as brackets, strings and letters go."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._fresh: list[str] = []
        self._open: list[str] = []
        self._in_string = False
        self._is_escaped = False
        self._in_literal = False

    def push(self, text: str, start: int) -> int:
        """Read on from `start`. Returns the index behind what belongs to the value, or at what broke it."""
        while start < len(text) and not self.is_done and not self.is_broken:
            if self._in_string:
                end = self._string(text, start)
                # Line breaks and the like must be escaped in JSON, which models forget.
                self._fresh.append(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text[start:end]))
            else:
                end = self._literal(text, start) if self._in_literal else self._structure(text, start)
                self._fresh.append(text[start:end])
            start = end
        return start

    def take(self) -> str:
        """The value's text that is new since the last time."""
        fresh = "".join(self._fresh)
        self._fresh.clear()
        return fresh

    def _string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        found = _STRING_EVENT.search(text, at)
        if found is None:
            return len(text)
        if found[0] == "\\":
            self._is_escaped = True
        else:
            self._in_string = False
            self.is_done = not self._open
        return found.end()

    def _literal(self, text: str, at: int) -> int:
        found = _LITERAL.match(text, at)
        assert found is not None  # it may match nothing
        self.is_done = found.end() < len(text)
        return found.end()

    def _structure(self, text: str, at: int) -> int:
        if self._open:
            found = _PLAIN.match(text, at)
            assert found is not None  # it may match nothing
            at = found.end()
            if at == len(text):
                return at
        letter = text[at]
        if letter == '"':
            self._in_string = True
        elif letter in "{[":
            self._open.append(letter)
        elif self._open and _CLOSES.get(letter) == self._open[-1]:
            self._open.pop()
            self.is_done = not self._open
        elif not self._open and (letter.isalnum() or letter == "-"):
            self._in_literal = True
        else:
            self.is_broken = True
            return at
        return at + 1


class CallText(Protocol):
    """The text of one call in pieces."""

    @property
    def name(self) -> str | None:
        """Of the function, when it is known."""

    @property
    def is_done(self) -> bool:
        """Whether its text has ended."""

    @property
    def is_broken(self) -> bool:
        """Whether it turned out to be no call. What came before may be one nevertheless, see `is_whole`."""

    @property
    def is_call(self) -> bool:
        """Whether it is known to be a call, so that clients may be told."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the call is missing, even if its text has not ended well."""

    def push(self, text: str) -> int:
        """Read on. Returns how many characters belong to the call."""

    def take(self) -> str:
        """The text of the arguments that is new since the last time."""


class BareArguments:
    """A call whose name stood before its arguments: one JSON object.

    Args:
        name: of the function.
    """

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self._value = JSONValue()

    @property
    def is_done(self) -> bool:
        """See `CallText`."""
        return self._value.is_done

    @property
    def is_broken(self) -> bool:
        """See `CallText`."""
        return self._value.is_broken

    @property
    def is_call(self) -> bool:
        """See `CallText`."""
        return True

    @property
    def is_whole(self) -> bool:
        """See `CallText`."""
        return self._value.is_done

    def push(self, text: str) -> int:
        """See `CallText`."""
        return self._value.push(text, 0)

    def take(self) -> str:
        """See `CallText`."""
        return self._value.take()


class CallObject:
    """A call as an object with its name and its arguments as members, in any order.

    Args:
        needs_arguments: nothing but arguments tells such an object from an answer that happens to be JSON. Members that
            calls do not have break it then, rather than hold such an answer back.
    """

    _ARGUMENTS = ("arguments", "parameters")
    _OTHERS = ("id", "type", "function")

    def __init__(self, *, needs_arguments: bool = False) -> None:
        self.name: str | None = None
        self.is_done = False
        self.is_broken = False
        self._needs_arguments = needs_arguments
        self._step = self._begin
        self._value = JSONValue()
        self._key = ""
        self._held: str | None = None
        """Text of arguments that nobody has taken; None while none have come."""
        self._streams = False
        """Whether the value that comes now is told as it comes."""
        self._has_arguments = False

    @property
    def is_call(self) -> bool:
        """See `CallText`."""
        return bool(self.name) and (self._held is not None or not self._needs_arguments)

    @property
    def is_whole(self) -> bool:
        """See `CallText`."""
        return self.is_call and (self._has_arguments or self.is_done)

    def push(self, text: str) -> int:
        """See `CallText`."""
        at = 0
        while at < len(text) and not self.is_done and not self.is_broken:
            at = self._step(text, at)
        return at

    def take(self) -> str:
        """See `CallText`."""
        if not self.is_call or self._held is None:
            if not self.is_done or self._has_arguments:
                return ""
            self._held, self._has_arguments = "{}", True  # a call without arguments
        new, self._held = self._held, ""
        return new

    # -- steps: each reads some characters and says where to go on ---------------------------------------------------

    def _begin(self, text: str, at: int) -> int:
        self.is_broken = text[at] != "{"
        self._step = self._before_key
        return at + (not self.is_broken)

    def _before_key(self, text: str, at: int) -> int:
        if text[at] in BLANKS or text[at] == ",":
            return at + 1
        if text[at] == "}":
            self.is_done = True
            return at + 1
        if text[at] != '"':
            self.is_broken = True
            return at
        self._value, self._step = JSONValue(), self._in_key
        return at

    def _in_key(self, text: str, at: int) -> int:
        end = self._value.push(text, at)
        if self._value.is_done:
            self._key = str(_loaded(self._value.take(), default=""))
            self._step = self._before_value
            known = (*self._ARGUMENTS, *self._OTHERS, "name")
            self.is_broken = self._needs_arguments and self._held is None and self._key not in known
        return end

    def _before_value(self, text: str, at: int) -> int:
        if text[at] in BLANKS or text[at] == ":":
            return at + 1
        self._value, self._step = JSONValue(), self._in_value
        if self._key in self._ARGUMENTS and self._held is None:
            self._held = ""
            self._streams = text[at] == "{"
        else:
            self._streams = False
        return at

    def _in_value(self, text: str, at: int) -> int:
        end = self._value.push(text, at)
        if self._streams:
            self._held = (self._held or "") + self._value.take()
        self.is_broken = self._value.is_broken
        if self._value.is_done:
            self._end_value()
            self._step, self._streams = self._before_key, False
        return end

    def _end_value(self) -> None:
        if self._key == "name" and self.name is None:
            name = _loaded(self._value.take(), default=None)
            if isinstance(name, str) and name:
                self.name = name
            else:
                self.is_broken = True
        elif self._key in self._ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            if not self._streams:
                self._held = _as_object(self._value.take())


def _as_object(raw: str) -> str:
    """Arguments that are no object: null is none at all, and a text may hold the object."""
    value = _loaded(raw, default=raw)
    if value is None:
        return "{}"
    if isinstance(value, str):
        if not value.strip():
            return "{}"
        inner = _loaded(value, default=None)
        return value.strip() if isinstance(inner, dict) else raw
    return raw


def _loaded(raw: str, *, default: object) -> object:
    try:
        return json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        return default
