"""Time limits that cost little where they are met, which is nearly always: each token of each stream passes several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

_TICK_S = 0.001
"""Event loops round to it."""


class TimeLimit:
    """`with TimeLimit(seconds)`: what is inside is cancelled when it takes longer, and TimeoutError raised.

    Like `asyncio.timeout`, in a fraction of its time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._timer: asyncio.TimerHandle | None = None
        self.is_expired = False
        """The time is over; stays so."""

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        assert self._task is not None, "needs a task"
        self._cancelling = self._task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(max(self._seconds, 0.0), self.expire)
        return self

    def expire(self) -> None:
        """End the time now. Not to be called from the task itself."""
        if self._task is not None and not self.is_expired:
            self.is_expired = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        assert self._timer is not None
        self._timer.cancel()
        # Somebody else may have cancelled the task as well, who then wants it to end.
        if self.is_expired and task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error


def _nothing() -> None:
    pass


class Alarm:
    """One timer for many waits of which nearly all end early: it is not moved until it goes off.

    Args:
        ring: called on the event loop when a wait lasts too long.
        loop: the running one, where it is at hand: Python makes a system call to find it.
    """

    def __init__(self, ring: Callable[[], None], loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._ring = ring
        self._loop = loop or asyncio.get_running_loop()
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    def set(self, seconds: float) -> None:
        """A wait begins, which may last so long."""
        self._due = due = self._loop.time() + seconds
        if self._timer is None:
            self._arm(due)
        elif self._timer_due > due:
            self._timer.cancel()
            self._arm(due)

    def clear(self) -> None:
        """It has ended."""
        self._due = None

    def stop(self) -> None:
        """No more waits. Lets go of who was called: often the one who holds the alarm."""
        self._due, self._ring = None, _nothing
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, due: float) -> None:
        self._timer_due, self._timer = due, self._loop.call_at(due, self._go_off)

    def _go_off(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._due - self._loop.time() > _TICK_S:
            self._arm(self._due)
        else:
            self._due = None
            self._ring()
