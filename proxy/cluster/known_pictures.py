"""Which pictures a prefill-decode worker should hold: those that this proxy saw go there, and those it tells of.

What it tells (`epd.key_digest`) is how a picture that came through another proxy needs no encoder here either.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from epd.key_digest import KeyDigest

MAX_PICTURES = 4096
"""Keys remembered for one worker. What it holds is bounded in bytes, and it says when it holds one no more."""


class KnownPictures:
    """Content keys, least recently used first."""

    def __init__(self, max_pictures: int = MAX_PICTURES) -> None:
        self._max = max_pictures
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._told = ""
        self._digest = KeyDigest()
        self._denied: set[str] = set()
        """Keys that the digest claims and the worker denied."""

    def __bool__(self) -> bool:
        return bool(self._keys) or bool(self._digest)

    def note_digest(self, text: str) -> None:
        """The worker tells what it holds."""
        if text != self._told:
            self._told, self._digest = text, KeyDigest.parse(text)
            self._denied.clear()

    def remember(self, key: str) -> None:
        """The worker took this picture's embeddings."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._max:
            self._keys.popitem(last=False)

    def forget(self, key: str) -> None:
        """The worker says that it does not hold them."""
        self._keys.pop(key, None)
        if len(self._denied) >= self._max:
            self._denied.clear()
        self._denied.add(key)

    def clear(self) -> None:
        """The worker is gone."""
        self._keys.clear()
        self.note_digest("")

    def among(self, keys: Iterable[str]) -> frozenset[str]:
        """Those of `keys` that the worker should hold."""
        return frozenset(key for key in keys if key in self._keys or (key in self._digest and key not in self._denied))

    def use(self, keys: Iterable[str]) -> frozenset[str]:
        """As `among`, for a request that goes to the worker: the worker's own order of use changes likewise."""
        held = self.among(keys)
        for key in held & self._keys.keys():
            self._keys.move_to_end(key)
        return held
