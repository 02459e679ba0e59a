"""Workers of one host that share its cores take turns: while one computes, the others wait.

Two workers that each run as many threads as there are cores lose time at every barrier of every matrix product: the
threads that are there wait for one that the kernel has not scheduled. Beside a language model, a picture took ten times
as long as alone. With turns both compute at full speed, one after the other.

Two locks make a turn: `next`, then `cores`, and then `next` is given back. So a worker that wants another turn at once
stands behind the one that waited meanwhile. A process that ends lets go of both, however it ends.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from epd.errors import ConfigError
from workers.shared_mutex import SharedMutex

SLICE_S = 0.02
"""Work that can pause has so long at least before it gives way."""
PERIOD_S = 0.07
"""So long it has together with what the others' turn before took. Beside steps of answers alone, which are short, it
goes on for longer; beside long ones, the pauses of answers stay bearable."""
_LONGEST_WAIT_S = 0.5
"""Then a worker computes without a turn: side by side is slow, but it goes on when another one hangs in its turn. Well
below the two seconds after which a worker without finished steps may count as stuck (`workers.stall_watch`)."""


class CoreTurns:
    """One worker's turns. For one thread: `with turns:` around what computes. Nobody waits while it is not used.

    Args:
        path: the same for all workers that share cores; two files of that name, with endings, are made there. None: the
            cores are this worker's alone, and turns cost nothing.
        longest_wait_s: how long to wait for a turn before going on without. Whoever waited for so long in vain does
            not wait again before it gets a turn: the other one may hang for minutes.

    Raises:
        ConfigError: the files can't be used.
    """

    def __init__(self, path: Path | None, *, longest_wait_s: float = _LONGEST_WAIT_S) -> None:
        self._longest_wait_s = longest_wait_s
        self._is_hopeful = True
        self._ends = 0.0
        """When work that can pause should give way."""
        self._has_turn = False
        self._locks: tuple[SharedMutex, SharedMutex] | None = None
        if path is not None:
            try:
                next_, cores = (SharedMutex(path.with_name(path.name + ending)) for ending in (".next", ".cores"))
            except OSError as error:
                raise ConfigError(f"--share-cores {path}: {error}") from error
            self._locks = next_, cores

    def __enter__(self) -> None:
        """Wait for a turn."""
        if self._locks is None:
            return
        next_, cores = self._locks
        asked = time.monotonic()
        give_up = asked + self._longest_wait_s * self._is_hopeful
        if next_.acquire(give_up):
            try:
                self._has_turn = cores.acquire(give_up)
            finally:
                next_.release()
        self._is_hopeful = self._has_turn
        began = time.monotonic()
        self._ends = max(began + SLICE_S, asked + PERIOD_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the turn."""
        if self._locks is not None and self._has_turn:
            self._has_turn = False
            self._locks[1].release()

    def give_way(self) -> None:
        """Within a turn that has lasted long enough: end it and wait for the next one. Else nothing."""
        if self._locks is not None and time.monotonic() >= self._ends:
            self.__exit__(None, None, None)
            self.__enter__()

    def close(self) -> None:
        """Close the files. The object may not be used any more."""
        for lock in self._locks or ():
            lock.close()
        self._locks = None
