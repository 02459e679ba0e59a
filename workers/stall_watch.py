"""Whether a worker moves: asked of its work itself, not of the thread that answers pings.

The event loop looks at a counter of finished steps or batches. What it learns in that way is how long a worker may be
silent: ten times as long as it was lately, or as it thinks that the largest step takes. One long silence is forgotten
over some minutes of work; one that comes again before it is forgotten stays within the limit. Time counts only as far
as the loop itself ran: a process that was stopped, or starved of its cores, did not watch, and is not to blame.
"""

from __future__ import annotations

from dataclasses import dataclass

LOOK_INTERVAL_S = 0.1
_LONGEST_LOOK_S = 2.5 * LOOK_INTERVAL_S
"""More than this between two looks was time without the loop."""
_FLOOR_S = 2.0
_MARGIN = 10.0
_FIRST_S = 30.0
"""Before much is known: first steps set things up."""
_LEARNED_STEPS = 20
_HALF_LIFE_S = 120.0
"""Of what was learned, in seconds of work: a worker that idles learns nothing, and forgets nothing."""


@dataclass(frozen=True)
class Progress:
    """What a service says of its work."""

    is_busy: bool
    """There is something to do."""
    steps: int
    """Steps or batches that have ended since the start."""
    largest_step_s: float = 0.0
    """What the largest step is thought to take; 0: unknown."""
    is_disturbed: bool = False
    """Something is under way that may hold up steps for long, and ends by itself, such as compiling."""


class StallWatch:
    """Looks at a worker's progress every `LOOK_INTERVAL_S`.

    Args:
        timeout_s: a stall of so many seconds means that the worker is stuck; None: learn it.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._last_look: float | None = None
        self._last = Progress(is_busy=False, steps=0)
        self._longest_s = 0.0
        """The longest silence that ended, less what was forgotten of it."""
        self._unforgotten_s = 0.0
        """Seconds of work since something was forgotten last."""
        self.stalled_s = 0.0
        """For how long there has been work and no step has ended."""

    def look(self, now: float, progress: Progress) -> None:
        """Take in what the service says at `now`, seconds of a monotonic clock."""
        passed = min(now - self._last_look, _LONGEST_LOOK_S) if self._last_look is not None else 0.0
        self._last_look = now
        if progress.is_busy:
            self._unforgotten_s += passed
        if progress.is_busy and progress.steps == self._last.steps:
            self.stalled_s += passed
        else:  # only here: the limit must not sink while it is being waited for
            self._learn()
        self._last = progress

    def _learn(self) -> None:
        self._longest_s = max(self._longest_s * 0.5 ** (self._unforgotten_s / _HALF_LIFE_S), self.stalled_s)
        self._unforgotten_s = self.stalled_s = 0.0

    @property
    def limit_s(self) -> float:
        """A stall longer than this means that the worker is stuck."""
        if self._timeout_s is not None:
            return self._timeout_s
        limit = max(_FLOOR_S, _MARGIN * self._longest_s, _MARGIN * self._last.largest_step_s)
        is_new = self._last.steps < _LEARNED_STEPS or self._last.largest_step_s == 0
        return max(limit, _FIRST_S) if is_new or self._last.is_disturbed else limit

    @property
    def is_stuck(self) -> bool:
        """Whether the worker should be treated as dead."""
        return self.stalled_s > self.limit_s
