"""Steps launched before the ones before them are read give what steps one after the other give."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from operator import methodcaller
from typing import Any

import pytest
import torch

from epd.types import FinishReason, Grammar, GrammarKind, Pooling, PoolingKind, SamplingParams
from tests.workers.engine.fakes import fake_engine
from tests.workers.engine.oracle import (
    IMAGE,
    Answers,
    Encoded,
    Oracle,
    Prompt,
    break_token,
    greedy,
    make_engine,
    picture,
    run,
)
from tests.workers.engine.test_random_schedules import LaunchedStep, LaunchingMemoryRunner
from workers.engine import pipeline
from workers.engine.engine import Engine
from workers.engine.outputs import StepOutput
from workers.engine.sampler import Draw, Sampled, SamplingRow, sample

TEXTS = ("a", "describe the image in one word", "the quick brown fox jumps over the lazy dog, what is left? " * 3)
NUMBER = Grammar(GrammarKind.REGEX, r"\d{2,6}")


def sampling_of(kind: int) -> SamplingParams:
    """One of many; the answers have different lengths."""
    common: dict[str, Any] = {"max_tokens": 16 + 2 * kind, "ignore_eos": kind % 2 == 0, "seed": kind}
    return [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.9, **common),
        SamplingParams(temperature=0.8, top_p=0.5, **common),
        SamplingParams(temperature=1.5, top_p=0.99, **common),
        SamplingParams(temperature=1.2, top_k=7, min_p=0.05, **common),
        SamplingParams(temperature=0.7, stop_token_ids=tuple(range(0, 300, 7)), **common),
        SamplingParams(temperature=0, min_tokens=5, stop_token_ids=tuple(range(0, 300, 3)), **common),
        SamplingParams(temperature=0.7, frequency_penalty=1.0, repetition_penalty=1.2, **common),
        SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, **common),
        SamplingParams(temperature=1, grammar=NUMBER, **common),
    ][kind]


class Schedule:
    """Requests that arrive, and are aborted, at random steps. The same for every engine."""

    def __init__(self, oracle: Oracle, seed: int, kinds: tuple[int, ...]) -> None:
        draw = random.Random(seed)
        self.actions: dict[int, list[Callable[[Engine], None]]] = {}
        self.prompts: dict[str, tuple[Prompt, SamplingParams]] = {}
        self.aborted: set[str] = set()
        for index in range(10):
            pictures = [picture(draw.randrange(3))] * (oracle.multimodal and draw.random() < 0.4)
            encoded = [oracle.encode(image, f"{seed}/{index}") for image in pictures]
            text = draw.choice(TEXTS) + f" {index % 4} " + IMAGE * len(encoded)
            name, arrives = f"r{index}", draw.choice((0, 0, 1, 3, 20))
            prompt, sampling = oracle.prompt(text, encoded), sampling_of(draw.choice(kinds))
            self.prompts[name] = prompt, sampling
            self.at(arrives, partial(self.ask, name=name))
            for one in encoded:
                self.at(arrives + draw.randrange(4), partial(give, one))
            if draw.random() < 0.2:
                self.aborted.add(name)
                self.at(arrives + 3 + draw.randrange(6), methodcaller("abort", name))

    def at(self, step: int, action: Callable[[Engine], None]) -> None:
        self.actions.setdefault(step, []).append(action)

    def ask(self, engine: Engine, name: str, resumed: tuple[int, ...] = ()) -> None:
        prompt, sampling = self.prompts[name]
        engine.add_request(name, prompt.token_ids, sampling, images=prompt.placeholders, resume_token_ids=resumed)

    def run(self, engine: Engine) -> Answers:
        answers = Answers()
        for step in range(max(self.actions) + 1):
            for action in self.actions.get(step, ()):
                action(engine)
            answers.take(engine.step())
            engine.check_integrity()
        answers.drain(engine)
        assert engine.load().kv_used_blocks == 0
        return answers


def give(encoded: Encoded, engine: Engine) -> None:
    engine.provide_embeddings(encoded.key, encoded.token_ids, encoded.grid_thw, encoded.rows)


def num_ahead(engine: Engine) -> int:
    return engine._steps.num_ahead


def check_same(schedule: Schedule, one: Answers, other: Answers) -> None:
    assert set(one.ends) == set(other.ends) == set(schedule.prompts)
    for name in set(schedule.prompts) - schedule.aborted:
        assert one.tokens[name] == other.tokens[name], name
        ends = one.ends[name], other.ends[name]
        assert ends[0].finish_reason is ends[1].finish_reason
        assert ends[0].stop_token_id == ends[1].stop_token_id
        pairs = zip(one.outputs[name], other.outputs[name], strict=True)
        for a, b in pairs:
            assert [x.token_id for x in a.logprobs] == [x.token_id for x in b.logprobs]
            assert len(a.prompt_logprobs) == len(b.prompt_logprobs)
    for name in schedule.aborted:  # as far as each came
        together = zip(one.tokens[name], other.tokens[name], strict=False)
        assert all(a == b for a, b in together)


ROOM = 60 << 10
"""For so few tokens that requests are preempted."""
SIMPLE = (0, 1, 4, 5)
"""Kinds of sampling for which decode steps can be launched ahead, and are right. A random model's top-p looks twice."""


@pytest.mark.parametrize("kinds", [SIMPLE, tuple(range(10))], ids=["simple", "all"])
def test_random_schedules_give_the_same_tokens(
    any_oracle: Oracle, kinds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_PAUSE_STEPS", 1)
    ahead = preemptions = 0
    for seed in range(3):
        schedule = Schedule(any_oracle, seed, kinds)
        limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 32, "block_size": 4}
        plain = make_engine(any_oracle.path, **limits)
        pipelined = make_engine(any_oracle.path, **limits, kv_cache_memory_bytes=ROOM, pipelining="on")
        expected, found = schedule.run(plain), schedule.run(pipelined)
        check_same(schedule, expected, found)
        assert num_ahead(plain) == 0
        ahead += num_ahead(pipelined)
        preemptions += pipelined.num_preemptions
    assert ahead > (60 if kinds == SIMPLE else 5)
    assert preemptions > 0


def test_decode_steps_are_launched_ahead(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path, pipelining="on")
    for index in range(3):
        prompt = qwen2.prompt(TEXTS[index])
        engine.add_request(f"{index}", prompt.token_ids, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    run(engine)
    assert num_ahead(engine) == 19


def test_an_answer_goes_on_where_it_was_handed_over(qwen2: Oracle) -> None:
    for steps in (1, 2, 5, 9):
        sampling = SamplingParams(max_tokens=14, temperature=0.9, seed=5, ignore_eos=True)
        prompts = {f"r{index}": qwen2.prompt(text).token_ids for index, text in enumerate(TEXTS)}
        plain, leaving, other = (make_engine(qwen2.path, pipelining=mode) for mode in ("off", "on", "on"))
        for engine in (plain, leaving):
            for name, prompt in prompts.items():
                engine.add_request(name, prompt, sampling)
        expected = run(plain).tokens
        first = Answers()
        for _ in range(steps):
            first.take(leaving.step())
        leaving.hand_over()
        leaving.check_integrity()
        first.drain(leaving)
        assert all(end.error is not None and end.error.code == "handed_over" for end in first.ends.values())
        assert leaving.load().kv_used_blocks == 0
        for name, prompt in prompts.items():
            other.add_request(name, prompt, sampling, resume_token_ids=first.tokens[name])
        rest = run(other).tokens
        assert {name: first.tokens[name] + rest[name] for name in prompts} == expected


def test_a_model_that_overflows_costs_the_request_alone(qwen2: Oracle) -> None:
    plain = make_engine(qwen2.path)
    long = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    prompts = [qwen2.prompt(text).token_ids for text in TEXTS]
    for index, prompt in enumerate(prompts):
        plain.add_request(f"r{index}", prompt, long)
    said = run(plain).tokens
    others = {token for name in ("r1", "r2") for token in said[name]} | {token for p in prompts for token in p}
    # Some token that only one answer has: NaN from there on, which shows when it is read.
    bad = next(token for token in said["r0"][2:-2] if token not in others)
    engine = make_engine(qwen2.path, pipelining="on")
    break_token(engine, bad)
    for index, prompt in enumerate(prompts):
        engine.add_request(f"r{index}", prompt, long)
    found = run(engine)
    assert found.ends["r0"].error is not None
    assert found.tokens["r0"] == said["r0"][: said["r0"].index(bad) + 1]
    assert (found.tokens["r1"], found.tokens["r2"]) == (said["r1"], said["r2"])
    assert num_ahead(engine) > 10


def test_pooling_stands_beside_it(qwen2: Oracle) -> None:
    engines = [make_engine(qwen2.path, pipelining=mode) for mode in ("off", "on")]
    found = []
    for engine in engines:
        engine.add_request("talk", qwen2.prompt(TEXTS[0]).token_ids, SamplingParams(max_tokens=12, temperature=0))
        answers = Answers()
        for index in range(8):
            if index == 4:
                prompt = qwen2.prompt(TEXTS[1]).token_ids
                engine.add_request("vector", prompt, SamplingParams(), pooling=Pooling(PoolingKind.LAST))
            answers.take(engine.step())
        answers.drain(engine)
        found.append((answers.tokens["talk"], answers.ends["vector"].pooled))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)


# -- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.01, 8.0])
def test_a_sampler_that_does_not_wait_looks_again_when_it_reads(spread: float) -> None:
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1)) * spread
    rows = [SamplingRow(SamplingParams(seed=index, top_p=0.95), 9) for index in range(6)]
    draw = Draw(logits, rows, waits=False)
    before = draw.tokens
    assert draw.read() == sample(logits, rows)
    assert draw.was_revised == (spread < 1)
    assert before.equal(draw.tokens) != draw.was_revised


# -- on a model that is a formula --------------------------------------------------------------------------------------


class Runner(LaunchingMemoryRunner):
    """Fails as told, when a step is launched or when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: Iterator[str] = iter(())

    def launch(self, *arguments: Any, **more: Any) -> LaunchedStep:
        failure = next(self.failures, "")
        if failure == "launch":
            raise RuntimeError("out of memory")
        step = super().launch(*arguments, **more)
        if failure == "read":
            failing: Any = step
            failing.read = lambda: self._fail(step)
        if failure == "revised":
            step.was_revised = True
        return step

    def _fail(self, step: LaunchedStep) -> list[Sampled]:
        self.compute_until(step)
        raise ArithmeticError("NaN")


def two_answers(failures: str) -> tuple[Engine, Answers]:
    runner = Runner()
    engine = fake_engine(runner, pipelined=True)
    for index in range(2):
        engine.add_request(f"{index}", [1, 2, 3 + index], SamplingParams(max_tokens=12, ignore_eos=True))
    runner.failures = iter(failures.split(","))
    return engine, run(engine)


@pytest.mark.parametrize(
    "failures",
    ["read", "launch", ",read", ",launch", ",,,read", ",,,launch", ",read,read", ",,revised", ",,read,launch"],
)
def test_a_step_that_fails_once_is_computed_again(failures: str) -> None:
    _, found = two_answers(failures)
    assert found.tokens == two_answers("")[1].tokens
    assert [len(tokens) for tokens in found.tokens.values()] == [12, 12]


def test_after_a_launch_in_vain_steps_are_not_launched_ahead_for_a_while() -> None:
    assert num_ahead(two_answers("")[0]) == 11
    assert num_ahead(two_answers("revised")[0]) == 1  # which was dropped
    assert num_ahead(two_answers(",,launch")[0]) == 1


def test_blocks_of_an_answer_that_ended_are_nobody_elses_until_its_last_step_ran() -> None:
    for length in range(1, 9):
        for stops_after in range(1, 6):
            runner = LaunchingMemoryRunner()
            engine = fake_engine(runner, pipelined=True, caching=False, num_blocks=12)
            alone = fake_engine(LaunchingMemoryRunner())
            alone.add_request("short", [1], greedy(9))
            stop = run(alone).tokens["short"][stops_after]
            engine.add_request("short", [1], SamplingParams(max_tokens=9, stop_token_ids=(stop,)))
            engine.add_request("long", [2] * length, SamplingParams(max_tokens=30, ignore_eos=True))
            assert run(engine).ends["short"].finish_reason is FinishReason.STOP
            assert runner.wrong == []


def test_aborting_all_leaves_a_step_that_is_dropped() -> None:
    engine = fake_engine(LaunchingMemoryRunner(), pipelined=True)
    engine.add_request("r", [1, 2], SamplingParams(max_tokens=12, ignore_eos=True))
    outputs: list[StepOutput] = [output for _ in range(3) for output in engine.step()]
    engine.abort("r")
    engine.check_integrity()
    assert engine.load().kv_used_blocks > 0  # the step that was launched writes to them
    # The same name again is another request.
    engine.add_request("r", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    answers = Answers()
    while engine.has_work():
        outputs += engine.step()
        engine.check_integrity()
    assert [output.finish_reason for output in outputs if output.finish_reason] == [
        FinishReason.ABORT,
        FinishReason.LENGTH,
    ]
    ends = [output for output in outputs if output.finish_reason is FinishReason.LENGTH]
    answers.take(ends)
    assert engine.load().kv_used_blocks == 0


def test_newcomers_are_admitted_as_soon_as_there_is_room() -> None:
    runner = LaunchingMemoryRunner()
    engine = fake_engine(runner, pipelined=True)
    for index in range(4):
        engine.add_request(f"{index}", [1, index], SamplingParams(max_tokens=8 + 4 * index, ignore_eos=True))
    engine.step()
    engine.add_request("late", [5, 6], SamplingParams(max_tokens=2, ignore_eos=True))  # four run at most
    answers = Answers()
    order = []
    while engine.has_work():
        outputs = engine.step()
        answers.take(outputs)
        order += [(output.request_id, output.finish_reason) for output in outputs]
    ended = order.index(("0", FinishReason.LENGTH))
    assert ("late", None) in order[ended : ended + 8]  # in the step that follows
    assert runner.seen["ahead"] > 8
