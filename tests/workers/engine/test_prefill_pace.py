from __future__ import annotations

import pytest

from workers.engine.prefill_pace import PrefillPace


def test_nothing_is_limited_before_anything_is_known_or_without_a_target() -> None:
    assert PrefillPace(0.06).limit() is None
    pace = PrefillPace(0)
    pace.observe(100, 0, 10.0)
    assert pace.limit() is None
    unmeasured = PrefillPace(0.06)
    unmeasured.observe(100, 4, 0.0)  # a clock that stands still
    assert unmeasured.limit() is None


def test_the_limit_fills_what_decoding_leaves_of_the_target() -> None:
    pace = PrefillPace(0.06)
    pace.observe(200, 0, 0.2)
    assert pace.limit() == 60
    pace.observe(0, 4, 0.02)
    assert pace.limit() == pytest.approx(40, abs=1)


@pytest.mark.parametrize("believed_s", [0.2, 0.001])
def test_steps_settle_at_the_target_whatever_was_believed_before(believed_s: float) -> None:
    token_s, decode_s, target_s = 0.0004, 0.015, 0.06
    pace = PrefillPace(target_s)
    pace.observe(2, 0, 0.05)  # a first step is slow
    for _ in range(20):
        pace.observe(0, 1, believed_s)
    limits, durations = [], []
    for _ in range(400):
        limit = pace.limit()
        assert limit is not None
        limits.append(limit)
        durations.append(decode_s + limit * token_s)
        pace.observe(limit, 8, durations[-1])
    assert [duration for limit, duration in zip(limits, durations, strict=True) if limit][-1] == pytest.approx(
        target_s, rel=0.1
    )
    assert 0 < limits.count(0) <= len(limits) / 30


def test_it_follows_a_machine_that_becomes_slower() -> None:
    pace = PrefillPace(0.06)
    limits = []
    for token_s in [0.0001] * 20 + [0.001] * 20:
        limit = pace.limit() or 512
        pace.observe(limit, 0, limit * token_s)
        limits.append(pace.limit())
    assert limits[19] == pytest.approx(600, rel=0.02)
    assert limits[-1] == pytest.approx(60, rel=0.1)


def test_small_prompts_do_not_hide_what_large_ones_cost() -> None:
    pace = PrefillPace(0.06)
    for _ in range(3):
        pace.observe(500, 0, 0.5)
        pace.observe(2, 0, 0.02)  # ten times as much a token: the fixed cost of a step
    assert pace.limit() == pytest.approx(60, rel=0.1)


def test_prompts_go_on_where_decoding_alone_takes_longer_than_the_target() -> None:
    pace = PrefillPace(0.06)
    for _ in range(30):
        pace.observe(0, 64, 0.1)
    pace.observe(100, 0, 0.1)
    assert pace.limit() == pytest.approx(50, abs=1)
    pace.observe(100, 0, 10.0)
    assert pace.limit() == 16


def test_few_answers_wait_longer_for_many_prompts() -> None:
    pace = PrefillPace(0.06)
    pace.observe(200, 0, 0.2)
    assert [pace.limit(prompts, 4) for prompts in (0, 1, 4)] == [60, 60, 60]
    assert pace.limit(prompts=8, answers=4) == 120
    assert [pace.limit(prompts, 4) for prompts in (16, 1000)] == [240, 240]
