"""Embeddings of pictures seen before, so that a repeated picture costs no second run of the vision tower."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What can be held against a bound in bytes."""

    @property
    def nbytes(self) -> int:
        """Memory that the value takes."""


V = TypeVar("V", bound=Sized)


@dataclass(frozen=True)
class EncodedImage:
    """What the vision tower made of one picture, ready for the wire."""

    token_ids: tuple[int, ...]
    """What the picture's placeholder expands to."""
    grid_thw: tuple[int, int, int] | None
    """As in `epd.messages.Embeddings`, like `shape`."""
    shape: tuple[int, ...]
    dtype: str
    """Such as `bfloat16`."""
    data: memoryview
    """`shape` × `dtype`, C order, little endian. Never modified."""

    @property
    def nbytes(self) -> int:
        """Memory of the rows and of the token ids."""
        return self.data.nbytes + 8 * len(self.token_ids)


class EmbeddingCache(Generic[V]):
    """Least recently used first out, bounded in bytes. For one thread.

    Args:
        capacity_bytes: sum of `nbytes` of all values at most; 0 keeps nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity of {capacity_bytes} bytes")
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._values: OrderedDict[str, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> V | None:
        """The value, which becomes the most recently used; None when it is not there. Counts a hit or a miss."""
        value = self._values.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return value

    def put(self, key: str, value: V) -> None:
        """Keep the value, in place of an older one of this key. One larger than the whole cache is not kept."""
        self._drop(key)
        if value.nbytes > self.capacity_bytes:
            return
        while self.used_bytes + value.nbytes > self.capacity_bytes:
            self._drop(next(iter(self._values)))
            self.evictions += 1
        self._values[key] = value
        self.used_bytes += value.nbytes

    def check_integrity(self) -> None:
        """Recount; raises AssertionError when the books don't balance. For tests and idle moments."""
        assert self.used_bytes == sum(value.nbytes for value in self._values.values())
        assert self.used_bytes <= self.capacity_bytes

    def _drop(self, key: str) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.used_bytes -= value.nbytes
