"""Random bytes that nobody can guess. The kernel is asked for many at a time: each asking is a system call."""

from __future__ import annotations

import os
from collections import deque

PIECE_BYTES = 16
_PIECES = 256
_left: deque[bytes] = deque()
os.register_at_fork(after_in_child=_left.clear)  # or both processes would go on with the same ones


def random_piece() -> bytes:
    """`PIECE_BYTES` bytes, which nobody else gets. From any thread."""
    while True:
        try:
            return _left.pop()
        except IndexError:
            fresh = os.urandom(_PIECES * PIECE_BYTES)
            _left.extend(fresh[at : at + PIECE_BYTES] for at in range(0, len(fresh), PIECE_BYTES))
