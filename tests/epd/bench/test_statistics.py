from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from epd.bench.statistics import Record, Slo, percentile, spread, summarise, summarise_kinds


def record(ttft_ms: float | None = 10.0, e2e_ms: float = 100.0, tokens: int = 10, **fields: Any) -> Record:
    values: dict[str, Any] = {
        "kind": "text",
        "start_ms": 0.0,
        "ttft_ms": ttft_ms,
        "e2e_ms": e2e_ms,
        "output_tokens": tokens,
    }
    return Record(**values | fields)


@pytest.mark.parametrize("percent", [0, 37, 50, 90, 99, 100])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_percentiles_are_numpys(percent: float, size: int) -> None:
    values = np.random.default_rng(size).normal(size=size).tolist()
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_no_values() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)
    assert spread([None]).p50 is None


def test_time_per_output_token_counts_the_tokens_behind_the_first() -> None:
    assert record(10, 100, 10).tpot_ms == pytest.approx(10.0)
    assert record(10, 100, 1).tpot_ms is None
    assert record(ttft_ms=None).tpot_ms is None


def test_failed_requests_count_as_errors_and_nowhere_else() -> None:
    failed = record(1.0, 5.0, 3, error="http 503")
    summary = summarise([record(), record(30, 120), failed], 2.0, Slo())
    assert (summary.requests, summary.succeeded, summary.errors) == (3, 2, {"http 503": 1})
    assert summary.ttft_ms.p50 == 20
    assert summary.output_tokens == 20
    assert summary.output_tokens_per_s == 10
    assert summary.requests_per_s == summary.goodput_per_s == 1


def test_goodput_needs_every_bound() -> None:
    records = [
        record(10, 100, 10),
        record(60, 150, 10),
        record(10, 910, 10),
        record(10, 10, 1),
        record(error="timeout"),
    ]

    def goodput(slo: Slo) -> float:
        return summarise(records, 1.0, slo).goodput_per_s

    assert goodput(Slo()) == 4
    assert goodput(Slo(ttft_ms=50)) == 3
    assert goodput(Slo(tpot_ms=50)) == 3
    assert goodput(Slo(ttft_ms=50, tpot_ms=50)) == 2


def test_kinds_have_rows_of_their_own_when_there_are_several() -> None:
    text, image = record(), record(kind="image", gaps_ms=(1.0, 3.0))
    assert list(summarise_kinds([text], 1.0, Slo())) == ["text"]
    rows = summarise_kinds([text, image], 1.0, Slo())
    assert list(rows) == ["all", "text", "image"]
    assert [row.requests for row in rows.values()] == [2, 1, 1]
    assert rows["image"].itl_ms.mean == 2
    assert summarise_kinds([], 1.0, Slo())["all"].requests == 0
