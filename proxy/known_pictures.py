"""Which pictures a prefill-decode worker should hold, as far as this proxy saw them go there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

MAX_PICTURES = 4096
"""Keys remembered for one worker. What it holds is bounded in bytes, and it says when it holds one no more."""


class KnownPictures:
    """Content keys, least recently used first."""

    def __init__(self, max_pictures: int = MAX_PICTURES) -> None:
        self._max = max_pictures
        self._keys: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def remember(self, key: str) -> None:
        """The worker took this picture's embeddings."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._max:
            self._keys.popitem(last=False)

    def forget(self, key: str) -> None:
        """The worker says that it does not hold them."""
        self._keys.pop(key, None)

    def clear(self) -> None:
        """The worker is gone."""
        self._keys.clear()

    def among(self, keys: Iterable[str]) -> frozenset[str]:
        """Those of `keys` that the worker should hold."""
        return frozenset(key for key in keys if key in self._keys)

    def use(self, keys: Iterable[str]) -> frozenset[str]:
        """As `among`, for a request that goes to the worker: the worker's own order of use changes likewise."""
        held = self.among(keys)
        for key in held:
            self._keys.move_to_end(key)
        return held
