"""Names for the contents of KV blocks, by which requests with a common prefix find each other's.

The keys and values of a token depend on everything before it, so the name of a block covers it: a hash of the name of
the block before, the block's tokens, and the pictures that reach into it. All pictures have the same placeholder
tokens, so what counts is their content key and where the block lies in them. Only full blocks have names.

SHA-256 and a secret of this process: another user who could make two prompts collide would read a stranger's context,
and one who could compute names might learn from timings what others asked. Blocks of half-known content are never
shared, and a shared block is never written to.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from array import array
from operator import attrgetter

from workers.engine.request import EngineRequest, ImageSpan


class BlockHasher:
    """Computes the names of a request's full blocks, each once."""

    def __init__(self, block_size: int) -> None:
        """Name blocks of `block_size` tokens, differently in each instance."""
        self._block_size = block_size
        self._salt = os.urandom(32)

    def names(self, request: EngineRequest) -> list[bytes]:
        """The names of all full blocks of the tokens that are known, as also kept in the request."""
        names = request.block_names
        for index in range(len(names), request.num_known_tokens // self._block_size):
            names.append(self._name(request, index, names[-1] if names else self._root(request)))
        return names

    def _root(self, request: EngineRequest) -> bytes:
        """What the first block's name is made of: requests share nothing with those of another `cache_salt`."""
        if not request.cache_salt:
            return self._salt
        return hashlib.sha256(self._salt + request.cache_salt.encode()).digest()

    def _name(self, request: EngineRequest, index: int, parent: bytes) -> bytes:
        start = index * self._block_size
        end = start + self._block_size
        # Fields of fixed length, or with their length before them, so that two contents never read the same.
        digest = hashlib.sha256(parent + array("q", request.token_ids[start:end]).tobytes())
        for span in _overlapping(request.image_spans, start, end):
            key = span.content_key.encode()
            digest.update(array("q", [len(key), start - span.offset, span.length]).tobytes() + key)
        return digest.digest()


def _overlapping(spans: tuple[ImageSpan, ...], start: int, end: int) -> tuple[ImageSpan, ...]:
    """Those of the spans, rising and disjoint, that share tokens with [start, end)."""
    first = bisect.bisect_right(spans, start, key=lambda span: span.offset + span.length)
    last = bisect.bisect_left(spans, end, key=attrgetter("offset"))
    return spans[first:last]
