"""What one worker has to do, as far as this proxy can tell: the worker's own report, and what was sent since.

A report is up to half a second old when it is read, and other proxies read the same one. Connections keep order, so a
report that answers ping k covers exactly what this proxy sent before ping k; the rest is added from the worker's own
rate. What the worker counts beyond this proxy's requests belongs to other proxies (`foreign`). These place as this one
does, on the strength of the same reports, so that what this one sent since counts once for each of them (`rivals`):
without it all would rush to the worker that was idle half a second ago.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable

import msgspec

from epd.messages import Load

_MEMORY = 0.9
"""Weight of what was learned before, at each observation."""
_MOST_MS = 1e9
"""Times that workers report are below that, or wrong."""
_MOST_CORRECTION = 4.0
"""A worker's predictions are scaled by so much at most, up or down."""


class _Item(msgspec.Struct, eq=False):
    """A request in the worker's hands."""

    units: float
    after: int
    """Sequence of the last ping before it was sent."""
    sent: float
    ahead: float
    """Units that the worker had at hand when it was sent."""
    content: str


class WorkLedger:
    """One worker's work. Not thread-safe.

    Args:
        is_serial: whether the worker does one after the other, as encoders do, so that the time until a result is that
            of all the work ahead of it too; else only requests that found it idle teach their time.
        clock: seconds, monotonic.
    """

    def __init__(self, *, is_serial: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._is_serial = is_serial
        self._clock = clock
        self._observed_ms = self._observed_units = 0.0
        self.reset()

    def reset(self) -> None:
        """The worker is gone, and all that it had at hand."""
        self._items: dict[Hashable, _Item] = {}
        self._waiting: dict[Hashable, _Item] = {}
        """Those of them that have not begun: few, where many streams are open."""
        self.reported_mine = 0
        """Requests of this proxy that the report covers and that are not answered yet."""
        self._contents: Counter[str] = Counter()
        self._reported = Load()
        self._reported_sequence = 0
        self._reported_at = self._clock()

    # -- what happens ------------------------------------------------------------------------------------------------

    def sent(self, key: Hashable, *, units: float, sequence: int, content: str = "") -> None:
        """A request is on its way.

        Args:
            key: of the request, as for `begun` and `ended`.
            units: size of the work: prompt tokens, or pictures of mean size.
            sequence: of the last ping that was sent before.
            content: content key, of a picture.
        """
        self.ended(key)
        ahead = self.foreign * units + sum([item.units for item in self._waiting.values()])
        self._items[key] = self._waiting[key] = item = _Item(units, sequence, self._clock(), ahead, content)
        self.reported_mine += self._is_covered(item)
        if content:
            self._contents[content] += 1

    def begun(self, key: Hashable, *, units: float | None = None) -> None:
        """The work that `units` measure is done: the first token or the picture is there.

        Args:
            key: of the request.
            units: what it was in truth, such as without tokens from the prefix cache; 0 teaches nothing.
        """
        item = self._waiting.pop(key, None)
        if item is None:
            return
        done = item.units if units is None else units
        if done > 0 and (self._is_serial or not item.ahead):
            self._observed_ms = _MEMORY * self._observed_ms + (self._clock() - item.sent) * 1000
            self._observed_units = _MEMORY * self._observed_units + item.ahead + done

    def ended(self, key: Hashable) -> None:
        """The request left the worker, one way or another."""
        item = self._items.pop(key, None)
        if item is None:
            return
        self._waiting.pop(key, None)
        self.reported_mine -= self._is_covered(item)
        if item.content:
            self._contents[item.content] -= 1
            if not self._contents[item.content]:
                del self._contents[item.content]

    def report(self, load: Load, sequence: int) -> None:
        """The worker's answer to the ping of that sequence; 0 when no ping asked for it: the last order stands."""
        self._reported, self._reported_at = _usable(load), self._clock()
        self._reported_sequence = max(sequence, self._reported_sequence)
        self.reported_mine = sum(map(self._is_covered, self._items.values()))

    def _is_covered(self, item: _Item) -> bool:
        """Whether the report counts it."""
        return item.after < self._reported_sequence

    # -- what follows ------------------------------------------------------------------------------------------------

    def has(self, content: str) -> bool:
        """Whether the worker is at this picture now."""
        return content in self._contents

    def content(self, key: Hashable) -> str:
        """Content key of a request in hand; empty for prompts and requests that are not."""
        item = self._items.get(key)
        return item.content if item is not None else ""

    @property
    def foreign(self) -> int:
        """Requests of other proxies, as of the report."""
        return max(0, self._reported.running + self._reported.waiting - self.reported_mine)

    @property
    def rate(self) -> float:
        """Milliseconds for one more unit; 0: the worker has not learned it yet."""
        return self._reported.ms_per_unit * self._correction

    @property
    def _correction(self) -> float:
        """How much longer things take, as seen from here, than the worker predicts."""
        if not self._observed_units or not self._reported.ms_per_unit:
            return 1.0
        ratio = self._observed_ms / self._observed_units / self._reported.ms_per_unit
        return min(max(ratio, 1 / _MOST_CORRECTION), _MOST_CORRECTION)

    def requests(self, rivals: float = 1.0) -> float:
        """Requests at hand, this proxy's and others'. `rivals`: proxies that place like this one, itself included."""
        return self.foreign + self.reported_mine + rivals * (len(self._items) - self.reported_mine)

    def outstanding_ms(self, rivals: float = 1.0) -> float:
        """Predicted time until all work at hand is done; of use only when `rate` is known."""
        elapsed_ms = (self._clock() - self._reported_at) * 1000
        left = max(0.0, self._reported.work_ms * self._correction - elapsed_ms)
        since = sum(item.units for item in self._waiting.values() if not self._is_covered(item))
        return left + rivals * self.rate * since


def _usable(load: Load) -> Load:
    """Without times that are none: one infinity or NaN would spoil the choice among all workers."""
    if all(0 <= each <= _MOST_MS for each in (load.work_ms, load.ms_per_unit)):
        return load
    return msgspec.structs.replace(load, work_ms=0.0, ms_per_unit=0.0)
