"""How requests start and end, with a fake model."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from epd.errors import ContextLengthExceeded, EPDError, InvalidRequest, Overloaded, WorkerFailed
from epd.types import FinishReason, SamplingParams
from tests.workers.engine.fakes import CONTEXT, EOS, HIDDEN, IMAGE_TOKEN, VOCAB, FakeClock, FakeRunner, fake_engine
from tests.workers.engine.oracle import Answers, run
from workers.engine.chunks import ScheduledChunk
from workers.engine.engine import Engine
from workers.engine.request import ImagePlaceholder
from workers.engine.sampler import Sampled, SamplingRow

PROMPT = [1, 2, IMAGE_TOKEN, 3]
IMAGES = (ImagePlaceholder("k", 2),)


def provide(engine: Engine, key: str = "k", rows: int = 3, token_ids: Sequence[int] | None = None) -> None:
    tokens = [IMAGE_TOKEN] * rows if token_ids is None else token_ids
    engine.provide_embeddings(key, tokens, (1, 2, 2), torch.ones(rows, HIDDEN))


def test_a_request_ends_once_at_max_tokens_with_its_times_and_lengths() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    engine.add_request("a", [5, 6, 7], SamplingParams(max_tokens=4))
    answers = Answers()
    answers.take(engine.step())
    assert engine.load().running == 1
    answers.drain(engine)
    assert answers.tokens["a"] == [3, 4, 5, 6]
    end = answers.ends["a"]
    assert (end.finish_reason, end.prompt_tokens, end.error) == (FinishReason.LENGTH, 3, None)
    assert set(end.timings_ms) == {"queue", "prefill", "decode"}
    assert runner.prompts == {}


def test_prompt_tokens_are_on_the_first_and_the_last_output() -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("a", [5, 6, 7], SamplingParams(max_tokens=3))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [output.prompt_tokens for output in outputs] == [3, 0, 3]


def test_no_max_tokens_means_the_rest_of_the_context() -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("a", [1] * 10, SamplingParams())
    answers = run(engine)
    assert len(answers.tokens["a"]) == CONTEXT - 10
    assert answers.ends["a"].finish_reason is FinishReason.LENGTH


def test_stop_token_ends_the_answer_and_is_its_last_token() -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("a", [1, 1], SamplingParams(stop_token_ids=(5, 10_000)))
    answers = run(engine)
    assert answers.tokens["a"] == [2, 3, 4, 5]
    assert answers.ends["a"].stop_token_id == 5
    assert answers.ends["a"].finish_reason is FinishReason.STOP


def test_tokens_that_end_are_forbidden_before_min_tokens() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    engine.add_request("a", [1], SamplingParams(min_tokens=2, max_tokens=3, stop_token_ids=(7,)))
    seen = []
    while engine.has_work():
        engine.step()
        seen.append(runner.banned[0])
    assert seen == [{EOS, 7}, {EOS, 7}, set()]


def test_ignore_eos_leaves_only_the_requests_own_stop_tokens() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    engine.add_request("a", [1], SamplingParams(min_tokens=1, max_tokens=1, stop_token_ids=(7,), ignore_eos=True))
    engine.step()
    assert runner.banned[0] == {7}


def test_embeddings_that_come_later_start_all_who_wait_for_them() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    for name in "ab":
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=2), images=IMAGES)
    assert not engine.has_work()
    assert engine.load().waiting == 2
    provide(engine)
    assert runner.prompts["a"] == [1, 2, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 3]
    answers = run(engine)
    assert answers.tokens == {"a": [6, 7], "b": [6, 7]}
    assert "embeddings_wait" in answers.ends["a"].timings_ms


def test_embeddings_that_came_before_start_the_request_at_once_also_a_second_time() -> None:
    engine = fake_engine(FakeRunner())
    provide(engine)
    assert engine.has_embeddings("k")
    for name in "ab":
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=2), images=IMAGES)
        assert run(engine).tokens == {name: [6, 7]}


@pytest.mark.parametrize("early_steps", [0, 1, 3])
def test_abort_frees_everything_at_once(early_steps: int) -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    provide(engine)
    engine.add_request("a", PROMPT * 5, SamplingParams(), images=IMAGES)
    for _ in range(early_steps):
        engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.abort("unknown")
    load = engine.load()
    assert (load.running, load.waiting, load.kv_used_blocks, runner.prompts) == (0, 0, 0, {})
    engine.check_integrity()
    assert engine.has_work()
    outputs = engine.step()
    assert [output.finish_reason for output in outputs] == [FinishReason.ABORT]
    assert not engine.has_work()


def test_abort_while_waiting_for_embeddings_then_the_embeddings_come() -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("a", PROMPT, SamplingParams(), images=IMAGES)
    engine.abort("a")
    provide(engine)
    assert [output.finish_reason for output in engine.step()] == [FinishReason.ABORT]
    engine.check_integrity()


def test_an_id_can_be_used_again_after_its_end_but_not_before() -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("a", [1], SamplingParams(max_tokens=1))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add_request("a", [1], SamplingParams())
    run(engine)
    engine.add_request("a", [1], SamplingParams(max_tokens=1))
    assert run(engine).tokens["a"] == [1]


def test_a_request_past_its_deadline_ends_with_an_error_wherever_it_is() -> None:
    clock = FakeClock()
    engine = fake_engine(FakeRunner(), clock=clock)
    engine.add_request("running", [1], SamplingParams(), timeout_s=5)
    engine.add_request("picture", PROMPT, SamplingParams(), images=IMAGES, timeout_s=6)
    engine.add_request("patient", [1], SamplingParams(max_tokens=9))
    answers = Answers()
    answers.take(engine.step())
    assert engine.seconds_to_deadline() == 5
    clock.now += 6
    answers.drain(engine)
    codes = {name: end.error.code if end.error else None for name, end in answers.ends.items()}
    assert codes == {"running": "timeout", "picture": "timeout", "patient": None}
    assert engine.seconds_to_deadline() is None


def test_an_earlier_deadline_of_the_same_id_means_nothing() -> None:
    clock = FakeClock()
    engine = fake_engine(FakeRunner(), clock=clock)
    engine.add_request("a", [1], SamplingParams(max_tokens=1), timeout_s=5)
    run(engine)
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=1), images=IMAGES, timeout_s=100)
    clock.now += 6
    assert not engine.has_work()
    assert engine.seconds_to_deadline() == 94
    provide(engine)
    assert run(engine).ends["a"].error is None


def test_an_idle_engine_has_work_once_a_deadline_passes() -> None:
    clock = FakeClock()
    engine = fake_engine(FakeRunner(), clock=clock)
    engine.add_request("a", PROMPT, SamplingParams(), images=IMAGES, timeout_s=1)
    assert not engine.has_work()
    clock.now += 2
    assert engine.has_work()
    assert len(engine.step()) == 1
    assert not engine.has_work()


def test_a_request_that_the_model_fails_on_ends_alone() -> None:
    runner = FakeRunner()
    runner.poison = {13}
    engine = fake_engine(runner)
    for name, prompt in (("a", [1, 2]), ("bad", [13]), ("b", [1, 2])):
        engine.add_request(name, prompt, SamplingParams(max_tokens=3))
    engine.add_request("waits", PROMPT, SamplingParams(max_tokens=1), images=IMAGES)
    answers = Answers()
    answers.take(engine.step())
    error = answers.ends["bad"].error
    assert error is not None
    assert (error.code, "secret" in error.message) == ("internal_error", False)
    engine.check_integrity()
    provide(engine)
    answers.drain(engine)
    assert answers.tokens == {"a": [2, 3, 4], "bad": [], "b": [2, 3, 4], "waits": [6]}
    assert engine.load().kv_used_blocks == 0


def test_blocks_of_a_request_that_the_model_fails_on_stay_with_those_who_share_them() -> None:
    runner = FakeRunner()
    runner.poison = {13}
    engine = fake_engine(runner)
    opening = [1] * 8
    engine.add_request("before", [*opening, 2], SamplingParams(max_tokens=1))
    run(engine)
    for name, last in (("a", 3), ("bad", 13), ("b", 4)):
        engine.add_request(name, [*opening, last], SamplingParams(max_tokens=3))
    answers = run(engine)
    assert {name for name, end in answers.ends.items() if end.error is not None} == {"bad"}
    assert (answers.tokens["a"], answers.tokens["b"]) == ([9, 10, 11], [9, 10, 11])
    engine.add_request("after", [*opening, 5], SamplingParams(max_tokens=1))
    assert run(engine).ends["after"].cached_tokens == 0


def test_a_model_that_fails_on_everything_is_no_engine() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    engine.warm_up()
    assert runner.prompts == {}
    engine.check_integrity()
    engine.add_request("a", [1, 2], SamplingParams())
    runner.failure = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    engine.check_integrity()


def test_a_picture_that_the_model_can_not_place_costs_its_requests_only() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=1), images=IMAGES)
    runner.placing_failure = IndexError("secret detail")
    provide(engine)
    answers = run(engine)
    error = answers.ends["a"].error
    assert error is not None
    assert (error.code, "secret" in error.message) == ("internal_error", False)


def test_an_end_of_the_checkpoint_outside_its_vocabulary_is_not_masked() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner)
    engine.info = replace(engine.info, eos_token_ids=frozenset({EOS, VOCAB}))
    engine.add_request("a", [1], SamplingParams(min_tokens=1, max_tokens=1))
    engine.step()
    assert runner.banned[0] == {EOS}


@pytest.mark.parametrize("timeout_s", [math.inf, 1e300])
def test_an_endless_timeout_is_a_long_one(timeout_s: float) -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("a", PROMPT, SamplingParams(), images=IMAGES, timeout_s=timeout_s)
    wait_s = engine.seconds_to_deadline()
    assert wait_s is not None
    assert wait_s < threading.TIMEOUT_MAX


def test_a_timeout_that_is_no_number_is_refused() -> None:
    engine = fake_engine(FakeRunner())
    with pytest.raises(InvalidRequest):
        engine.add_request("a", PROMPT, SamplingParams(), images=IMAGES, timeout_s=math.nan)
    engine.check_integrity()


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("waits", PROMPT, SamplingParams(), images=IMAGES, timeout_s=1)
    for number in range(1000):
        engine.add_request(str(number), [1], SamplingParams(), timeout_s=1000)
        engine.abort(str(number))
    assert len(engine._deadlines) < 200
    assert engine.seconds_to_deadline() == 1


def test_embeddings_sent_again_are_there_for_the_request_behind_them() -> None:
    engine = fake_engine(FakeRunner(), store_bytes=3 * HIDDEN * 4)
    provide(engine)
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=1), images=IMAGES)
    run(engine)
    provide(engine)
    with pytest.raises(Overloaded):
        provide(engine, "other")
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=1), images=IMAGES)
    assert run(engine).tokens == {"b": [6]}


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    engine = fake_engine(FakeRunner(), max_waiting=2)
    for name in "ab":
        engine.add_request(name, [1], SamplingParams(max_tokens=1))
    with pytest.raises(Overloaded):
        engine.add_request("c", [1], SamplingParams(max_tokens=1))
    engine.check_integrity()
    assert set(run(engine).ends) == {"a", "b"}


@pytest.mark.parametrize(
    ("token_ids", "sampling", "images", "error"),
    [
        ([], {}, (), InvalidRequest),
        ([VOCAB], {}, (), InvalidRequest),
        ([-1], {}, (), InvalidRequest),
        ([1], {"max_tokens": -1}, (), InvalidRequest),
        ([1], {"max_tokens": CONTEXT}, (), ContextLengthExceeded),
        ([1] * CONTEXT, {}, (), ContextLengthExceeded),
        ([1, 2], {}, (ImagePlaceholder("k", 2),), InvalidRequest),
        ([1, 2], {}, (ImagePlaceholder("k", 1), ImagePlaceholder("l", 1)), InvalidRequest),
    ],
)
def test_a_request_that_cannot_be_is_refused_at_the_door(
    token_ids: list[int], sampling: dict[str, Any], images: tuple[ImagePlaceholder, ...], error: type[EPDError]
) -> None:
    engine = fake_engine(FakeRunner())
    with pytest.raises(error):
        engine.add_request("a", token_ids, SamplingParams(**sampling), images=images)
    engine.check_integrity()
    assert not engine.has_work()


def test_a_limit_that_may_not_fit_is_what_is_left_of_the_context() -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("a", [1] * (CONTEXT - 3), SamplingParams(max_tokens=CONTEXT, fits_context=True, ignore_eos=True))
    engine.add_request("b", [1], SamplingParams(max_tokens=2, fits_context=True, ignore_eos=True))
    ended = run(engine)
    assert {name: len(ended.tokens[name]) for name in "ab"} == {"a": 3, "b": 2}
    with pytest.raises(ContextLengthExceeded):
        engine.add_request("c", [1] * CONTEXT, SamplingParams(max_tokens=1, fits_context=True))


def test_a_text_model_takes_no_pictures() -> None:
    engine = fake_engine(FakeRunner(), images=False)
    with pytest.raises(InvalidRequest, match="no images"):
        engine.add_request("a", PROMPT, SamplingParams(), images=IMAGES)
    with pytest.raises(InvalidRequest, match="no images"):
        provide(engine)


@pytest.mark.parametrize("embeddings_first", [True, False])
def test_pictures_that_outgrow_the_context_end_the_request_with_an_error(embeddings_first: bool) -> None:
    engine = fake_engine(FakeRunner())
    if embeddings_first:
        provide(engine, rows=CONTEXT)
    engine.add_request("a", PROMPT, SamplingParams(), images=IMAGES)
    if not embeddings_first:
        provide(engine, rows=CONTEXT)
    engine.add_request("b", [1], SamplingParams(max_tokens=1))
    answers = run(engine)
    error = answers.ends["a"].error
    assert error is not None
    assert error.code == "context_length_exceeded"
    assert str(CONTEXT + 3) in error.message
    assert answers.tokens["b"] == [1]


@pytest.mark.parametrize(
    ("token_ids", "rows", "message"),
    [
        ([IMAGE_TOKEN] * 2, torch.ones(3, HIDDEN), "for 2 image tokens"),
        ([IMAGE_TOKEN] * 2, torch.ones(2, HIDDEN + 1), "shape"),
        ([1], torch.ones(0, HIDDEN), "for 0 image tokens"),
        ([IMAGE_TOKEN, VOCAB], torch.ones(1, HIDDEN), "vocabulary"),
        ([IMAGE_TOKEN], torch.full((1, HIDDEN), torch.nan), "not finite"),
        ([IMAGE_TOKEN], torch.full((1, HIDDEN), 1e300, dtype=torch.float64), "not finite"),
        ([IMAGE_TOKEN], torch.ones(1, HIDDEN, dtype=torch.int64), "type"),
    ],
)
def test_bad_embeddings_are_refused_and_better_ones_still_help(
    token_ids: list[int], rows: torch.Tensor, message: str
) -> None:
    engine = fake_engine(FakeRunner())
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=1), images=IMAGES)
    with pytest.raises(WorkerFailed, match=message):
        engine.provide_embeddings("k", token_ids, (1, 2, 2), rows)
    engine.check_integrity()
    provide(engine)
    assert run(engine).tokens["a"] == [6]


def test_an_engine_that_leaves_hands_over_what_it_has_no_room_for_and_finishes_the_rest() -> None:
    engine = fake_engine(FakeRunner())
    for name in "abcd":
        engine.add_request(name, [1, 2], SamplingParams(max_tokens=6))
    engine.step()
    engine.add_request("waits", [1, 2], SamplingParams(max_tokens=6))
    engine.add_request(
        "needs a picture", [1, IMAGE_TOKEN], SamplingParams(max_tokens=6), images=[ImagePlaceholder("k", 1)]
    )
    engine.leave()
    answers = Answers()
    answers.take(engine.step())
    assert [(name, end.error and end.error.code) for name, end in answers.ends.items()] == [("waits", "handed_over")]
    engine.add_request("late", [1, 2], SamplingParams(max_tokens=6))
    answers.drain(engine)
    codes = {name: end.error and end.error.code for name, end in answers.ends.items()}
    assert codes == {"waits": "handed_over", "late": "handed_over"} | dict.fromkeys("abcd")
    engine.hand_over()
    assert [output.error and output.error.code for output in engine.step()] == ["handed_over"]
    engine.check_integrity()


def test_the_load_tells_how_long_the_work_at_hand_will_take() -> None:
    """A token of a prompt takes a second here, and so does a step of answers."""

    class SlowRunner(FakeRunner):
        def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[Sampled]:
            clock.now += sum(1 if chunk.request.is_decoding else chunk.length for chunk in chunks)
            return super().run(chunks, rows)

    clock = FakeClock()
    engine = fake_engine(SlowRunner(), clock=clock, caching=False)
    engine.add_request("taught", [1] * 8, SamplingParams(max_tokens=4))
    assert (engine.load().work_ms, engine.load().ms_per_token) == (0, 0)
    run(engine)
    assert (engine.load().work_ms, engine.load().ms_per_token) == (0, 1000)
    engine.add_request("runs", [1] * 10, SamplingParams(max_tokens=4))
    assert engine.load().work_ms == pytest.approx(14_000)
    engine.step()
    assert engine.load().work_ms == pytest.approx(3000)
    assert engine.load().largest_step_ms > 10_000


@pytest.mark.parametrize("stage", ["embeddings", "queue", "computed"])
def test_who_runs_out_of_time_hears_where(stage: str) -> None:
    clock = FakeClock()
    engine = fake_engine(FakeRunner(), clock=clock)
    images = [ImagePlaceholder("k", 1)] if stage == "embeddings" else []
    engine.add_request("r", [1, IMAGE_TOKEN], SamplingParams(max_tokens=20), images=images, timeout_s=5)
    if stage == "computed":
        engine.step()
    clock.now += 6
    (output,) = engine.step()
    assert output.error is not None
    assert output.error.code == "timeout"
    assert stage in output.error.message
    assert not output.token_ids


def test_a_picture_longer_than_the_context_is_not_kept() -> None:
    engine = fake_engine(FakeRunner())
    with pytest.raises(ContextLengthExceeded, match=str(CONTEXT + 1)):
        provide(engine, rows=1, token_ids=[*([1] * CONTEXT), IMAGE_TOKEN])
    assert not engine.has_embeddings("k")
