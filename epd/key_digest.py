"""Which content a worker holds, small enough to travel in every sign of life: a Bloom filter over content keys.

8,192 bits, 4 of them for each key (B. H. Bloom, "Space/time trade-offs in hash coding with allowable errors", 1970): of
keys that a worker does not hold, 1 of 140 seems held at 700 keys, 1 of 6 at 2,000. Whoever acts on it must be told when
it was wrong.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

_BYTES = 1024
_HASHES = 4
_MAX_TEXT = 4 * (_BYTES // 3 + 1)


class KeyDigest:
    """A set of keys that may answer yes wrongly, and never no."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._bits = bytearray(_BYTES)
        for key in keys:
            for place in _places(key):
                self._bits[place >> 3] |= 1 << (place & 7)

    @classmethod
    def parse(cls, text: str) -> KeyDigest:
        """What `str` of another one gave. Anything else, from another version or a liar, holds nothing."""
        digest = cls()
        if len(text) <= _MAX_TEXT:
            try:
                bits = base64.b64decode(text, validate=True)
            except ValueError:
                return digest
            if len(bits) == _BYTES:
                digest._bits[:] = bits
        return digest

    def __contains__(self, key: str) -> bool:
        return all(self._bits[place >> 3] >> (place & 7) & 1 for place in _places(key))

    def __bool__(self) -> bool:
        return any(self._bits)

    def __str__(self) -> str:
        return base64.b64encode(self._bits).decode() if self else ""


def _places(key: str) -> tuple[int, ...]:
    """Bits of a key, each of 0 ≤ place < 8,192."""
    hashed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=2 * _HASHES).digest())
    return tuple((hashed >> (16 * index)) % (8 * _BYTES) for index in range(_HASHES))
