"""Random answers are a function of the request alone."""

from __future__ import annotations

from typing import Any

import pytest

from epd.types import SamplingParams
from tests.workers.engine.oracle import Oracle, Prompt, add, break_token, make_engine, run

KINDS: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"temperature": 0.3}]
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4


def params(index: int) -> SamplingParams:
    return SamplingParams(seed=100 + index, max_tokens=40, **KINDS[index % len(KINDS)])


@pytest.fixture(scope="module")
def alone(qwen2: Oracle) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for index in range(6):
        engine = make_engine(qwen2.path)
        add(engine, f"r{index}", qwen2.prompt(f"number {index} is"), params(index))
        answers |= run(engine).tokens
    return answers


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 8}, {"kv_cache_memory_bytes": 9 * BLOCK_BYTES, "max_model_len": 64}],
    ids=["batched", "chunked", "preempted"],
)
def test_same_seed_same_tokens(qwen2: Oracle, alone: dict[str, list[int]], settings: dict[str, Any]) -> None:
    engine = make_engine(qwen2.path, **settings)
    for index in range(6):
        add(engine, f"r{index}", qwen2.prompt(f"number {index} is"), params(index))
    assert run(engine).tokens == alone
    assert ("max_model_len" in settings) == (engine.num_preemptions > 0)


def test_resumed_elsewhere_with_prompt_and_tokens_so_far(qwen2: Oracle, alone: dict[str, list[int]]) -> None:
    prompt = qwen2.prompt("number 0 is")
    prompt.token_ids = prompt.token_ids + alone["r0"][:17]
    engine = make_engine(qwen2.path)
    add(engine, "r", prompt, SamplingParams(seed=100, max_tokens=23))
    assert run(engine).tokens["r"] == alone["r0"][17:]


def test_other_seeds_give_other_tokens(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path)
    for seed in range(5):
        add(engine, str(seed), qwen2.prompt("what"), SamplingParams(seed=seed, max_tokens=12))
    assert len({tuple(tokens) for tokens in run(engine).tokens.values()}) == 5


def test_min_tokens_holds_back_a_stop_token(qwen2: Oracle) -> None:
    prompt = qwen2.prompt("describe")
    stop = qwen2.generate(prompt)[0]
    engine = make_engine(qwen2.path)
    for minimum in (0, 5):
        sampling = SamplingParams(temperature=0, max_tokens=12, min_tokens=minimum, stop_token_ids=(stop,))
        add(engine, str(minimum), prompt, sampling)
    answers = run(engine)
    assert answers.tokens["0"] == [stop]
    assert len(answers.tokens["5"]) >= 5
    assert stop not in answers.tokens["5"][:5]


def test_a_request_whose_values_are_no_numbers_ends_alone(qwen2: Oracle) -> None:
    """Real models overflow in float16; here the embedding of one token is NaN."""
    innocent, settings = qwen2.prompt("what is it?"), {"max_model_len": 64, "kv_cache_memory_bytes": 9 * BLOCK_BYTES}
    engine = make_engine(qwen2.path, **settings)
    add(engine, "alone", innocent)
    expected = run(engine).tokens["alone"]
    bad = next(token for token in range(1, engine.info.vocab_size) if token not in {*innocent.token_ids, *expected})
    break_token(engine, bad)
    poisoned = Prompt([*innocent.token_ids, bad, *innocent.token_ids * 2], [], [])
    for _ in range(3):  # the later ones get blocks that the earlier ones gave back
        for name in ("bad", "good"):
            add(engine, name, poisoned if name == "bad" else innocent)
        answers = run(engine)
        assert answers.tokens == {"bad": [], "good": expected}
        error = answers.ends["bad"].error
        assert error is not None
        assert error.code == "internal_error"
