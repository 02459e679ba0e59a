"""Python's collector of reference cycles, while a process starts and afterwards.

Importing torch and transformers makes a million objects that live as long as the process. As Python sets it, the
collector looks through all of them again and again while they come, which is a quarter of a worker's start, and once in
a while afterwards, when every request waits for it.
"""

from __future__ import annotations

import gc

_WHILE_STARTING = 50_000
"""New objects before the youngest are looked through. Not endless: cycles may hold tensors while a model is loaded."""
_AFTERWARDS = gc.get_threshold()


def start() -> None:
    """Collect rarely, until `settle`. Before the first large import."""
    gc.set_threshold(_WHILE_STARTING)


def keep() -> None:
    """What was imported so far stays, and is never looked through again. Before anything is loaded, since cycles that
    nobody holds stay as well."""
    gc.freeze()


def settle(young: int | None = None) -> None:
    """The process is ready: what is there now stays as well, but for cycles that nobody holds.

    Args:
        young: new objects before the youngest are looked through from now on; None: as Python sets it.
    """
    gc.collect()
    gc.freeze()
    _, *older = _AFTERWARDS
    gc.set_threshold(young or _AFTERWARDS[0], *older)
