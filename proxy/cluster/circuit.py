"""A circuit breaker: a worker that answers pings but fails what it is given gets nothing for a while.

    closed ──MAX_FAILURES within WINDOW_S──▶ open ──pause──▶ half open: one trial ──success──▶ closed
                                              ▲                               └──failure──▶ open, twice as long

After Nygard, Release It!, chapter 5. Only faults of the worker count, not what it refuses politely.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MAX_FAILURES = 5
WINDOW_S = 10.0
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 30.0
TRIAL_S = 10.0
"""A trial that has not ended by then makes room for another one: it may be a long answer."""


class Circuit:
    """The record of one worker. `clock`: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self._open_until: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._trial_until = 0.0

    @property
    def state(self) -> str:
        """`closed`, `open`, or `half_open` when a trial may go or is under way."""
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until else "half_open"

    @property
    def lets_through(self) -> bool:
        """Whether the worker may get a request now."""
        if self._open_until is None:
            return True
        return self.state == "half_open" and self._clock() >= self._trial_until

    def sent(self) -> None:
        """A request goes to the worker; in a half-open circuit it is the trial."""
        if self._open_until is not None and self.state == "half_open":
            self._trial_until = self._clock() + TRIAL_S

    def succeeded(self) -> None:
        """The worker did what it was asked for, or began to."""
        if self._open_until is None:
            self._failures.clear()
        elif self.state == "half_open":
            self.reset()

    def failed(self) -> None:
        """The worker failed a request."""
        now = self._clock()
        if self.state == "half_open":
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._open(now)
        elif self.state == "closed":
            self._failures.append(now)
            if len(self._failures) == MAX_FAILURES and now - self._failures[0] <= WINDOW_S:
                self._open(now)

    def reset(self) -> None:
        """Another process is there now, or the trial went well."""
        self._failures.clear()
        self._open_until = None
        self._pause_s = FIRST_PAUSE_S
        self._trial_until = 0.0

    def _open(self, now: float) -> None:
        self._open_until = now + self._pause_s
        self._trial_until = 0.0
