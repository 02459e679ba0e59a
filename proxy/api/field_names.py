"""What the fields of a request that was translated are called in the request that the client sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from epd.errors import EPDError

_MESSAGE = re.compile(r"messages\[(\d+)\]")
_TOOL = re.compile(r"(tools\[\d+\])\.function(\.\w+)?")


class FieldNames:
    """Renames the fields that errors name.

    Args:
        common: of every request: ours → the client's.
        tool_keys: of a tool's function: ours → the client's, which stand in the tool itself.
    """

    def __init__(self, common: Mapping[str, str], tool_keys: Mapping[str, str] | None = None) -> None:
        self._names = dict(common)
        self._common = common
        self._tool_keys = tool_keys or {}

    def note(self, ours: str, theirs: str) -> None:
        """A place in the messages, such as `messages[2].content[0]`, comes from there."""
        self._names[ours] = theirs

    def rename(self, error: EPDError) -> EPDError:
        """The same error, which now names the client's fields."""
        param, message = error.param, error.message
        for ours, theirs in self._common.items():
            if "_" in ours:  # a plain word may be no field
                message = _replace(message, ours, theirs)
        if param is not None:
            renamed = self._renamed(param)
            if "[" in param or "." in param:
                message = _replace(message, param, renamed)
            error.param = renamed
        error.message = message
        return error

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Rename what errors that are raised within name."""
        try:
            yield
        except EPDError as error:
            self.rename(error)
            raise

    @contextmanager
    def without(self, first: int, count: int) -> Iterator[None]:
        """While so many messages, from the one at `first` on, are left out: the places of all behind them."""
        if not count:
            yield
            return
        whole = self._names
        self._names = {_moved(ours, first, count): theirs for ours, theirs in whole.items()}
        try:
            yield
        except EPDError as error:
            self.rename(error)
            raise
        finally:
            self._names = whole

    def _renamed(self, param: str) -> str:
        if tool := _TOOL.match(param):
            key = (tool[2] or "").removeprefix(".")
            named = f".{self._tool_keys.get(key, key)}" if key else ""
            return tool[1] + named + param[tool.end() :]
        for length in _ends(param):
            if (found := self._names.get(param[:length])) is not None:
                return found + param[length:].replace(".function.", ".")
        if message := _MESSAGE.match(param):
            return self._names.get(message[0], param)
        return param


def _moved(place: str, first: int, count: int) -> str:
    """Our name of a place once messages before it are left out; that of one that is left out names nothing."""
    found = _MESSAGE.match(place)
    if found is None or int(found[1]) < first:
        return place
    index = int(found[1]) - count
    return f"messages[{index}]{place[found.end() :]}" if index >= first else ""


def _ends(param: str) -> list[int]:
    """Where a path ends, or a part of it, the longest first."""
    return [len(param), *sorted((one.start() for one in re.finditer(r"[.\[]", param)), reverse=True)]


def _replace(text: str, ours: str, theirs: str) -> str:
    return re.sub(rf"(?<![\w.\[]){re.escape(ours)}(?![\w\[])", lambda _: theirs, text)
