"""Who wrote what in a rendered conversation: the strings of users, marks around them, and cuts in what they forge."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from itertools import islice, pairwise, takewhile
from typing import Any

from epd.errors import InvalidRequest

Message = dict[str, Any]
"""`role`, `content` (str, None or a list of parts {"type": "text", "text": …} | {"type": "image"}), and what else."""

_PLAIN_KEYS = frozenset({"role", "type", "id", "tool_call_id"})
"""Templates compare or measure their values, which are plain words."""
_USUAL_KEYS = _PLAIN_KEYS | {"content", "text"}
"""Plain words that need no look."""
_PLAIN_WORD = re.compile(r"[\w$.-]*", re.ASCII)


def map_strings(value: Any, change: Callable[[str], str], key: str | None = None) -> Any:
    """A copy of `value` with every string changed, except roles, types, ids and keys that are plain words."""
    if isinstance(value, str):
        return value if key in _PLAIN_KEYS and _PLAIN_WORD.fullmatch(value) else change(value)
    if isinstance(value, dict):
        return {
            name if _PLAIN_WORD.fullmatch(name) else change(name): map_strings(item, change, name)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [map_strings(item, change, key) for item in value]
    return value


def strings_of(value: Any) -> list[str]:
    """All that users may have written in messages and tools."""
    found: list[str] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[str], key: str | None = None) -> None:
    """`map_strings` without the copy."""
    if isinstance(value, str):
        if not (key in _PLAIN_KEYS and _PLAIN_WORD.fullmatch(value)):
            found.append(value)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in _USUAL_KEYS and not _PLAIN_WORD.fullmatch(name):
                found.append(name)
            if name == "content" and isinstance(item, str):  # as most are, and no call is cheap enough
                found.append(item)
            else:
                _collect(item, found, name)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, found, key)


def with_tail(messages: Sequence[Message], tail: str) -> list[Message]:
    """The messages, with `tail` behind the last one's text.

    Raises:
        InvalidRequest: it has none.
    """
    *before, last = messages
    content = None if last.get("tool_calls") else last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + tail}]
    if isinstance(content, list) and content and content[-1].get("type") == "text":
        *parts, part = content
        return [*before, {**last, "content": [*parts, {**part, "text": part["text"] + tail}]}]
    raise InvalidRequest(
        "continue_final_message: the last message does not end with text to go on with.", param="continue_final_message"
    )


def count_images(messages: Sequence[Message]) -> int:
    """Pictures among the parts of all messages."""
    images = 0
    for message in messages:
        if isinstance(content := message.get("content"), list):
            images += sum([part.get("type") == "image" for part in content])
    return images


class Markers:
    """Unguessable, numbered marks around user strings, made of private-use characters that no template cares about."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)
        self._pattern = re.compile(f"\ue000{self._nonce}(\\d+)([<>])")
        self._cores: list[str] = []

    def wrap(self, text: str) -> str:
        """Marks go inside the outer blanks, so that a template's `trim` still sees them."""
        core = text.strip()
        if not core:
            return text
        start, number = text.index(core), len(self._cores)
        self._cores.append(core)
        before, after = text[:start], text[start + len(core) :]
        return f"{before}\ue000{self._nonce}{number}<{core}\ue000{self._nonce}{number}>{after}"

    def strip(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Text without marks, and half-open spans of user text in it.

        Where a template cut one mark of a pair away, the span is as long as the text agrees with the user's string.
        """
        clean, spans = "", []
        opened: tuple[int, int] | None = None  # (number, position in `clean`)
        end = 0
        for match in self._pattern.finditer(text):
            clean += text[end : match.start()]
            end = match.end()
            number, is_open = int(match[1]), match[2] == "<"
            if opened is not None and (is_open or opened[0] != number):
                spans.append(self._span_after(clean, *opened))
                opened = None
            if is_open:
                opened = (number, len(clean))
            elif opened is not None:
                spans.append((opened[1], len(clean)))
                opened = None
            else:
                spans.append(self._span_before(clean, number))
        clean += text[end:]
        if opened is not None:
            spans.append(self._span_after(clean, *opened))
        return clean, spans

    def _span_after(self, clean: str, number: int, start: int) -> tuple[int, int]:
        return start, start + _shared_length(clean[start:], self._cores[number])

    def _span_before(self, clean: str, number: int) -> tuple[int, int]:
        core = self._cores[number]
        return len(clean) - _shared_length(clean[-len(core) :][::-1], core[::-1]), len(clean)


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def split_points(found: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """A point strictly inside each literal that overlaps a span, within the span where that is possible.

    Args:
        found: half-open, by start.
        spans: half-open, by start, not overlapping.
    """
    points, first = set(), 0
    for start, end in found:
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        for span_start, span_end in islice(spans, first, None):
            if span_start >= end:
                break
            low, high = max(start, span_start), min(end, span_end)
            points.add(min(max((low + high) // 2, start + 1), end - 1))
    return sorted(points)


def cut(text: str, points: list[int]) -> list[str]:
    """`text` in pieces that are not empty, cut at these points, which rise."""
    borders = [0, *points, len(text)]
    return [text[low:high] for low, high in pairwise(borders) if low < high]
