"""What a fault did to the traffic, in figures. No I/O, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from epd.bench.statistics import percentile
from tests.faults.asking import Outcome, Verdict

_SLACK = 1.5
_SLACK_S = 0.5
"""A wait counts as disturbed when it is longer than the longest one of the quiet phase, times and plus these."""
_SHOWN = 5
_LONG_S = 1.5
"""Waits beyond these are told one by one, `_SHOWN` at most."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault in the table."""

    title: str
    requests: int
    """Under way at the fault, or sent afterwards."""
    right: int
    """Of them, those that were answered right, be it after a refusal."""
    refused: int
    """Tries that were refused explicitly, and made again."""
    failed: dict[str, int]
    """Reason → requests that ended with an explicit error."""
    lost: list[str]
    """What must never happen."""
    added_p50_ms: float | None
    added_p99_ms: float | None
    longest_wait_s: float
    """That any client had between two pieces of an answer, or for an answer at once."""
    recovery_s: float | None
    """From the fault until the last moment at which a request failed, or had waited too long; None: not told."""
    problems: list[str] = field(default_factory=list)
    """Beside the traffic: a leak, an exit code, a cluster that did not become healthy."""
    note: str = ""
    refusals: dict[str, int] = field(default_factory=dict)
    """Reason → tries that were refused for it."""
    slowest: list[str] = field(default_factory=list)
    """The longest waits, to look for in the logs."""

    @property
    def success(self) -> float:
        """Share of requests that were answered right."""
        return self.right / self.requests if self.requests else 0.0

    @property
    def num_failed(self) -> int:
        """Requests that ended with an explicit error."""
        return sum(self.failed.values())


@dataclass(frozen=True, kw_only=True)
class Moments:
    """When what happened, by the monotonic clock."""

    fault: float
    """It struck."""
    watched: float
    """End of the time whose latencies count; afterwards, processes that were killed are started again."""
    counted_from: float
    """Recovery counts from here: the fault, or its end when it lasts."""


def make_row(title: str, outcomes: Sequence[Outcome], at: Moments, problems: Sequence[str] = (), note: str = "") -> Row:
    """The figures of one fault from all requests of its run."""
    quiet = [one for one in outcomes if one.ended < at.fault]
    after = [one for one in outcomes if one.ended >= at.fault]
    watched = [one for one in after if one.started < at.watched]
    unwell = [f"not quiet before the fault: {one.verdict}: {one.reason}" for one in quiet if _is_unwell(one)]
    lost = [f"{one.kind}, {_how(one)}: {one.reason}" for one in after if one.verdict is Verdict.LOST]
    failed = Counter(one.reason[:160] for one in after if one.verdict is Verdict.FAILED)
    recovery = _recovery_s(quiet, after, at)
    return Row(
        title=title,
        requests=len(after),
        right=sum(one.verdict is Verdict.RIGHT for one in after),
        refused=sum(len(one.refusals) - (one.verdict is Verdict.FAILED and bool(one.refusals)) for one in after),
        failed=dict(failed.most_common()),
        lost=lost,
        added_p50_ms=_added_ms(quiet, watched, 50),
        added_p99_ms=_added_ms(quiet, watched, 99),
        longest_wait_s=max((wait.seconds for one in watched for wait in one.waits), default=0.0),
        recovery_s=recovery,
        problems=[*unwell, *problems],
        note=note,
        refusals=dict(Counter(reason[:160] for one in after for _, reason in one.refusals).most_common()),
        slowest=_slowest(after, at),
    )


def _slowest(after: Sequence[Outcome], at: Moments) -> list[str]:
    waits = sorted(((wait, one) for one in after for wait in one.waits), key=lambda pair: -pair[0].seconds)
    return [
        f"{wait.seconds:.2f} s until {wait.ended - at.fault:.2f} s after the fault, "
        f"{one.kind}, {_how(one)}, sent at {one.started - at.fault:.2f} s, {len(one.refusals)} refusals"
        for wait, one in waits[:_SHOWN]
        if wait.seconds > _LONG_S
    ]


def _is_unwell(outcome: Outcome) -> bool:
    return outcome.verdict is not Verdict.RIGHT or bool(outcome.refusals)


def _how(outcome: Outcome) -> str:
    return "streamed" if outcome.stream else "at once"


def _added_ms(quiet: Sequence[Outcome], after: Sequence[Outcome], percent: float) -> float | None:
    """Difference of a percentile of the time to the whole answer; both phases draw from the same mix of requests."""
    before = [one.seconds for one in quiet if one.verdict is Verdict.RIGHT]
    behind = [one.seconds for one in after if one.verdict is Verdict.RIGHT and not one.is_extra]
    if not before or not behind:
        return None
    return 1000 * (percentile(behind, percent) - percentile(before, percent))


def _recovery_s(quiet: Sequence[Outcome], after: Sequence[Outcome], at: Moments) -> float:
    bounds = {stream: _bound_s(quiet, stream) for stream in (True, False)}
    disturbed = [at.counted_from]
    for one in after:
        if one.started > at.watched:
            continue
        disturbed += [wait.ended for wait in one.waits if wait.seconds > bounds[one.stream]]
        if one.verdict is not Verdict.RIGHT:
            disturbed.append(one.ended)
    return max(0.0, max(disturbed) - at.counted_from)


def _bound_s(quiet: Sequence[Outcome], stream: bool) -> float:
    """The longest wait that is no disturbance."""
    longest = max((wait.seconds for one in quiet if one.stream == stream for wait in one.waits), default=0.0)
    return _SLACK * longest + _SLACK_S
