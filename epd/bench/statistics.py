"""What a load run comes to: percentiles, rates, goodput. No I/O, no clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

PERCENTILES = (50, 90, 99)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request as its client saw it. Times in milliseconds."""

    kind: str
    """`text` or `image`."""
    start_ms: float
    """Since the run began."""
    error: str | None = None
    """Kind of failure, such as `http 503`; then the times below are what was seen until then."""
    ttft_ms: float | None = None
    """Until the first text."""
    e2e_ms: float = 0.0
    """Until the answer's end."""
    gaps_ms: tuple[float, ...] = ()
    """Between chunks with text."""
    output_tokens: int = 0
    """By the server's usage, or else the number of chunks with text."""
    prompt_tokens: int | None = None
    """By the server's usage."""

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token behind the first; None with fewer than two."""
        if self.ttft_ms is None or self.output_tokens < 2:
            return None
        return (self.e2e_ms - self.ttft_ms) / (self.output_tokens - 1)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and percentiles of one figure, in milliseconds; None where nothing was measured."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that a request must keep to count as good; None: no bound."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def is_met(self, record: Record) -> bool:
        """Whether the request succeeded within all bounds. An answer of one token has no time per token to exceed."""
        if record.error is not None:
            return False
        return _is_within(record.ttft_ms, self.ttft_ms) and _is_within(record.tpot_ms, self.tpot_ms)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one kind, or of all kinds, in one run."""

    requests: int
    succeeded: int
    errors: dict[str, int]
    """Kind of failure → how many."""
    ttft_ms: Spread
    itl_ms: Spread
    tpot_ms: Spread
    e2e_ms: Spread
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    """Those that succeeded."""
    goodput_per_s: float
    """Those that succeeded within the SLO."""


def _is_within(value: float | None, bound: float | None) -> bool:
    return value is None or bound is None or value <= bound


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default does.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("percentile of nothing")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Iterable[float | None]) -> Spread:
    """Of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return Spread(mean=None, p50=None, p90=None, p99=None)
    p50, p90, p99 = (percentile(known, percent) for percent in PERCENTILES)
    return Spread(mean=sum(known) / len(known), p50=p50, p90=p90, p99=p99)


def summarise(records: Sequence[Record], duration_s: float, slo: Slo) -> Summary:
    """Times come from requests that succeeded; so do tokens, since half an answer serves nobody."""
    good = [record for record in records if record.error is None]
    tokens = sum(record.output_tokens for record in good)
    return Summary(
        requests=len(records),
        succeeded=len(good),
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        ttft_ms=spread(record.ttft_ms for record in good),
        itl_ms=spread(gap for record in good for gap in record.gaps_ms),
        tpot_ms=spread(record.tpot_ms for record in good),
        e2e_ms=spread(record.e2e_ms for record in good),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in good),
        output_tokens=tokens,
        output_tokens_per_s=tokens / duration_s if duration_s > 0 else 0.0,
        requests_per_s=len(good) / duration_s if duration_s > 0 else 0.0,
        goodput_per_s=sum(map(slo.is_met, records)) / duration_s if duration_s > 0 else 0.0,
    )


def summarise_kinds(records: Sequence[Record], duration_s: float, slo: Slo) -> dict[str, Summary]:
    """`all`, and each kind where there is more than one."""
    kinds = sorted({record.kind for record in records}, reverse=True)
    rows = {"all" if len(kinds) > 1 else kinds[0] if kinds else "all": summarise(records, duration_s, slo)}
    if len(kinds) > 1:
        for kind in kinds:
            rows[kind] = summarise([record for record in records if record.kind == kind], duration_s, slo)
    return rows
