"""Whoever reads a generation, while it waits: told on the spot, or called to look for itself.

To wake a task for each token takes longer than to tell the token.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextvars import copy_context

from proxy.dispatch.work import Update
from proxy.timers import Alarm

Teller = Callable[[Update], bool]
"""Tells an update at once. False: the consumer has something to wait for before more can be told."""


def _nothing(_: Teller) -> bool:
    return False


class Consumer:
    """One task at a time, which waits for what comes again and again. Made within the request's context.

    Args:
        tell_all: tells by a teller what there is; returns whether the consumer may go on waiting.
        loop: the running one.
    """

    def __init__(self, tell_all: Callable[[Teller], bool], loop: asyncio.AbstractEventLoop) -> None:
        self._tell_all = tell_all
        self._loop, self._context = loop, copy_context()
        self._waiter: asyncio.Future[None] | None = None
        self._teller: Teller | None = None
        """Of the consumer that waits."""
        self._is_due = False
        """Whether it will be asked to tell something."""
        self._is_called = False
        """The consumer is, to look for itself."""
        self._heard_at = 0.0
        """`time.perf_counter()` when it last heard of anything."""
        self._alarm = Alarm(self._wake, loop)

    async def wait(self, time_left_s: Callable[[], float], timeout_s: float | None, teller: Teller | None) -> bool:
        """Wait until the consumer is called, or heard nothing for `timeout_s`.

        Args:
            time_left_s: of the request, in seconds.
            timeout_s: of silence; None: to the end of that time.
            teller: gets what comes meanwhile; None: nobody does.

        Returns:
            False where the time of the request is over.
        """
        patience_s = math.inf if timeout_s is None else timeout_s
        self._heard_at = time.perf_counter()
        self._teller, self._is_called = teller, False
        try:
            while not self._is_called:
                left_s, silence_s = time_left_s(), self._heard_at + patience_s - time.perf_counter()
                if min(left_s, silence_s) <= 0:
                    return left_s > 0
                self._waiter = self._loop.create_future()
                self._alarm.set(min(left_s, silence_s))
                await self._waiter
        finally:
            self._alarm.clear()
            self._waiter = self._teller = None
        return True

    def notify(self) -> None:
        """There is news."""
        if self._teller is None:
            self.call()
        elif not self._is_due:
            # Later, so that what has come by then is told in one piece.
            self._is_due = True
            self._loop.call_soon(self._tell, context=self._context)

    def call(self) -> None:
        """Have the consumer look for itself."""
        self._teller, self._is_called = None, True
        self._wake()

    def stop(self) -> None:
        """Nobody waits any more. Lets go of who was called, often the one who holds this."""
        self._alarm.stop()
        self._tell_all = _nothing

    def _tell(self) -> None:
        self._is_due, teller = False, self._teller
        if teller is not None:  # else the consumer looks for itself
            self._heard_at = time.perf_counter()
            if not self._tell_all(teller):
                self.call()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
