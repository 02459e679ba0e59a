"""Whether a worker is silent for so long that it must be dead.

Counted in pings, not in seconds: seconds would blame the worker for a stall of this process, during which nobody can be
heard. And not while a picture is on its way there, since pings wait behind it: on a slow link that takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SILENT_PINGS = 4
"""A worker that says nothing while so many pings are sent is dead."""
SLOWEST_LINK_BYTES_S = 4 << 20
"""What is on its way is given the time that it takes at this speed, …"""
LONGEST_PAUSE_S = 30.0
"""A worker may announce that it says nothing for so long."""
LONGEST_UPLOAD_S = 6.0
"""… but no more than this since the worker was heard, however much it is."""


class Silence:
    """Since the last sign of life of one worker.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pings = 0
        self._heard_at = self._uploaded_at = self._excused_until = clock()

    def heard(self) -> None:
        """It said something."""
        self._pings = 0
        self._heard_at = self._clock()

    def sent(self, num_bytes: int) -> None:
        """So much is on its way to it."""
        self._uploaded_at = max(self._uploaded_at, self._clock()) + num_bytes / SLOWEST_LINK_BYTES_S

    def excused(self, seconds: float) -> None:
        """It said that it may be silent for so long."""
        self._excused_until = self._clock() + min(max(seconds, 0.0), LONGEST_PAUSE_S)

    def ping_passed(self) -> bool:
        """A ping was sent, and time for its answer has passed. True: it must be dead."""
        now = self._clock()
        if now >= min(self._uploaded_at, self._heard_at + LONGEST_UPLOAD_S) and now >= self._excused_until:
            self._pings += 1
        return self._pings >= SILENT_PINGS
