"""Where prompts with the same beginning went, so that the next one finds its prefix in that worker's KV cache.

A prompt is named by a chain of hashes, each over all that comes before its end: two prompts share their first k hashes
if and only if they begin alike up to the k-th end. Pictures count with their content keys, since their placeholders
look all the same. What is remembered is bounded, the least recently used goes first; it may be wrong, which costs
computing a prefix again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence

_BLOCK = 32
"""Tokens of a step of the chain; prompts shorter than that are not worth a detour."""
_FINE_BLOCKS = 64
_COARSE_BLOCK = 512
"""Behind so many fine steps they are longer, so that a long prompt costs few."""
_MAX_LENGTH = 256
"""Steps of a chain at most."""
MAX_PREFIXES = 1 << 16
"""Hashes remembered: about 10 MB."""
_MAX_HOMES = 4
"""Workers remembered for one prefix, the latest first."""

Chain = tuple[int, ...]


def prefix_chain(prompt: Sequence[int], pictures: Sequence[tuple[int, str]] = (), *, salt: str = "") -> Chain:
    """The chain of hashes of a prompt; empty for a short one.

    Args:
        prompt: token ids, one placeholder for each picture.
        pictures: offset of the placeholder and content key, offsets increasing.
        salt: names the model: the same ids mean something else to another one.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=8)
    chain: list[int] = []
    start, waiting = 0, list(reversed(pictures))
    while len(chain) < _MAX_LENGTH:
        end = start + (_BLOCK if len(chain) < _FINE_BLOCKS else _COARSE_BLOCK)
        if end > len(prompt):
            break
        digest.update(array("q", prompt[start:end]).tobytes())
        while waiting and waiting[-1][0] < end:
            offset, key = waiting.pop()
            digest.update(f"\0{offset}\0{key}\0".encode())
        chain.append(int.from_bytes(digest.copy().digest()))
        start = end
    return tuple(chain)


class PrefixMap:
    """Which workers computed which prefixes. Not thread-safe."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._max = max_prefixes
        self._homes: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def remember(self, chain: Chain, worker: str) -> None:
        """A prompt went to `worker`, which will hold all of it."""
        for prefix in reversed(chain):  # long prefixes are forgotten before what many prompts share
            others = [home for home in self._homes.pop(prefix, ()) if home != worker]
            self._homes[prefix] = (worker, *others[: _MAX_HOMES - 1])
        while len(self._homes) > self._max:
            self._homes.popitem(last=False)

    def matches(self, chain: Chain, workers: Collection[str]) -> dict[str, int]:
        """Steps of the chain that each worker should hold; those that hold none are left out."""
        found: dict[str, int] = {}
        for length in range(len(chain), 0, -1):
            for home in self._homes.get(chain[length - 1], ()):
                if home in workers:
                    found.setdefault(home, length)
            if len(found) == len(workers):
                break
        return found
