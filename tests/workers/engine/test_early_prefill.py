"""What stands before a missing picture is computed while the encoder works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epd.types import FinishReason, SamplingParams
from tests.workers.engine.fakes import HIDDEN, IMAGE_TOKEN, FakeClock, FakeRunner, fake_engine
from tests.workers.engine.oracle import IMAGE, Answers, Oracle, add, make_engine, picture, provide, run
from workers.engine.engine import Engine
from workers.engine.request import ImagePlaceholder
from workers.engine.scheduler import Scheduler

BLOCK_SIZE = 4
TEXT = list(range(10))


class Watched:
    """A fake engine, and the chunks that it computes."""

    def __init__(self, **settings: Any) -> None:
        self.runner = FakeRunner()
        self.engine = fake_engine(self.runner, **settings)
        self.answers = Answers()

    def add(self, name: str, *parts: list[int] | str, max_tokens: int = 2, timeout_s: float | None = None) -> None:
        """Ask with a prompt of texts and content keys of pictures."""
        prompt: list[int] = []
        images = []
        for part in parts:
            if isinstance(part, str):
                images.append(ImagePlaceholder(part, len(prompt)))
            prompt += [IMAGE_TOKEN] if isinstance(part, str) else part
        sampling = SamplingParams(max_tokens=max_tokens)
        self.engine.add_request(name, prompt, sampling, images=images, timeout_s=timeout_s)

    def provide(self, key: str, rows: int = 3) -> None:
        self.engine.provide_embeddings(key, [IMAGE_TOKEN] * rows, (1, 2, 2), torch.ones(rows, HIDDEN))

    def step(self) -> list[tuple[str, int, int]]:
        self.runner.chunks = []
        self.answers.take(self.engine.step())
        self.engine.check_integrity()
        return [(chunk.request.request_id, chunk.start, chunk.end) for chunk in self.runner.chunks]

    def steps(self) -> list[tuple[str, int, int]]:
        """All until nothing is left to compute."""
        chunks: list[tuple[str, int, int]] = []
        for _ in range(100):
            if not self.engine.has_work():
                return chunks
            chunks += self.step()
        raise AssertionError("it goes on and on")


def scheduler_of(engine: Engine) -> Scheduler:
    return engine._scheduler


def test_full_blocks_before_the_picture_are_computed_and_found_again() -> None:
    watched = Watched()
    watched.add("r", TEXT, "k", [1, 2])
    assert watched.step() == [("r", 0, 8)]
    load = watched.engine.load()
    assert (load.kv_used_blocks, load.running, load.waiting) == (0, 0, 1)
    assert not watched.engine.has_work()
    watched.provide("k")
    assert watched.step() == [("r", 8, 15)]
    watched.answers.drain(watched.engine)
    assert watched.answers.tokens["r"] == [15, 16]
    assert watched.answers.ends["r"].cached_tokens == 0  # by nobody else


def test_the_first_picture_is_computed_while_the_second_is_missing() -> None:
    watched = Watched()
    watched.add("r", [1, 2], "first", TEXT, "second", [1])
    assert not watched.engine.has_work()  # not one block is full
    watched.provide("first")
    assert watched.step() == [("r", 0, 12)]
    watched.provide("second")
    assert watched.step() == [("r", 12, 19)]


def test_a_picture_that_comes_while_the_text_before_it_is_computed_makes_room_for_itself() -> None:
    watched = Watched()
    watched.add("r", list(range(30)), "first", TEXT, "second", [1])
    assert watched.step() == [("r", 0, 16)]
    watched.provide("first")
    assert watched.step() == [("r", 16, 32)]
    assert watched.step() == [("r", 32, 40)]
    watched.provide("second")
    watched.answers.drain(watched.engine)
    assert watched.answers.tokens["r"] == [47, 48]


def test_a_later_picture_is_of_no_use_before_the_earlier_one() -> None:
    watched = Watched()
    watched.add("r", TEXT, "first", TEXT, "second", [1])
    watched.step()
    watched.provide("second")
    assert not watched.engine.has_work()
    watched.provide("first")
    assert watched.step() == [("r", 8, 24)]


def test_what_another_request_left_is_not_computed_early() -> None:
    watched = Watched()
    watched.add("before", TEXT, max_tokens=1)
    watched.step()
    watched.add("r", TEXT, "k")
    assert watched.step() == []
    assert not watched.engine.has_work()
    watched.provide("k")
    watched.answers.drain(watched.engine)
    assert watched.answers.ends["r"].cached_tokens == 8


def test_a_long_beginning_goes_in_chunks_and_may_be_overtaken_by_its_picture() -> None:
    watched = Watched()
    watched.add("r", list(range(30)), "k", [1])
    assert watched.step() == [("r", 0, 16)]
    assert watched.engine.load().kv_used_blocks == 7
    watched.provide("k")
    assert watched.engine.load().kv_used_blocks == 0
    assert watched.step() == [("r", 16, 32)]
    assert watched.step() == [("r", 32, 34)]


def test_complete_requests_go_first_and_take_blocks_that_they_need() -> None:
    watched = Watched(num_blocks=9)
    watched.add("early", list(range(30)), "k", [1])
    assert watched.step() == [("early", 0, 16)]
    watched.add("r", [50] * 24, max_tokens=1)
    assert watched.step() == [("r", 0, 16)]
    assert watched.step() == [("r", 16, 24)]
    assert watched.step() == [("early", 12, 28)]  # three of its blocks had not been needed
    watched.provide("k")
    watched.answers.drain(watched.engine)
    assert watched.answers.tokens["early"] == [34, 35]
    assert watched.engine.num_preemptions == 0


def test_a_decoding_request_takes_blocks_too() -> None:
    watched = Watched(num_blocks=8, batched_tokens=4)
    watched.add("r", [50] * 7, max_tokens=20)
    watched.step()
    watched.step()
    watched.add("early", list(range(22)), "k", [1], max_tokens=1)
    starts = [start for name, start, _ in watched.steps() if name == "early"]
    assert starts != sorted(starts)  # it lost blocks in between
    assert len(watched.answers.tokens["r"]) == 20
    assert watched.engine.num_preemptions == 0
    assert watched.engine.load().kv_used_blocks == 0


def test_two_that_do_not_fit_together_are_computed_one_after_the_other() -> None:
    watched = Watched(num_blocks=8)
    watched.add("second", [1], "first picture", list(range(30)), "k", [1])
    watched.add("first", list(range(40, 70)), "l", [1])
    watched.step()
    watched.provide("first picture")
    assert {name for name, _, _ in watched.steps()} == {"first", "second"}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_abort_frees_what_was_computed_early(steps: int) -> None:
    watched = Watched()
    watched.add("r", list(range(40)), "k")
    for _ in range(steps):
        watched.step()
    watched.engine.abort("r")
    watched.engine.check_integrity()
    assert watched.engine.load().kv_used_blocks == 0
    watched.step()
    assert watched.answers.ends["r"].finish_reason is FinishReason.ABORT
    assert watched.runner.prompts == {}


def test_embeddings_that_never_come_fail_the_request_at_its_deadline() -> None:
    clock = FakeClock()
    watched = Watched(clock=clock)
    watched.add("r", list(range(40)), "k", timeout_s=5)
    watched.step()
    clock.now += 6
    assert watched.step() == []
    error = watched.answers.ends["r"].error
    assert error is not None
    assert (error.code, "image embeddings" in error.message) == ("timeout", True)
    assert watched.engine.load().kv_used_blocks == 0


def test_a_request_that_the_model_fails_on_early_ends_alone() -> None:
    watched = Watched()
    watched.runner.poison = {77}
    watched.add("bad", [*TEXT, 77], "k")
    watched.add("good", [50] * 10, max_tokens=1)
    watched.step()
    error = watched.answers.ends["bad"].error
    assert error is not None
    assert error.code == "internal_error"
    assert watched.answers.tokens["good"] == [10]


def test_without_a_prefix_cache_nothing_is_computed_early() -> None:
    watched = Watched(caching=False)
    watched.add("r", TEXT, "k", [1, 2])
    assert not watched.engine.has_work()
    watched.provide("k")
    assert watched.step() == [("r", 0, 15)]


def test_no_part_of_an_atomic_span_is_computed_early() -> None:
    watched = Watched()
    watched.add("r", [1, 2], "k", [1], "l")
    watched.provide("k", rows=9)
    request = next(scheduler_of(watched.engine).requests())
    request.atomic_spans = ((2, 11),)
    scheduler_of(watched.engine).embeddings_arrived(request)
    assert all(end <= 2 or end >= 11 for _, _, end in watched.steps())


def test_answers_are_those_of_transformers(vision_oracle: Oracle) -> None:
    pictures = [picture(index, 90, 70 + 20 * index) for index in range(2)]
    encoded = [vision_oracle.encode(image, str(index)) for index, image in enumerate(pictures)]
    text = "the quick brown fox jumps over the lazy dog " * 2
    prompt = vision_oracle.prompt(f"{text}{IMAGE}{text}{IMAGE} what?", encoded)
    engine = make_engine(vision_oracle.path, max_num_batched_tokens=24)
    add(engine, "r", prompt)
    answers = Answers()
    for one in encoded:
        assert engine.has_work()
        assert not answers.drain(engine).tokens
        assert engine.load().kv_used_blocks == 0
        provide(engine, one)
    assert run(engine).tokens["r"] == vision_oracle.generate(prompt, pictures)
    request_tokens = len(prompt.token_ids) + sum(len(one.token_ids) - 1 for one in encoded)
    assert engine.load().prefix_cache_queries == request_tokens
    assert engine.load().prefix_cache_hits == 0
