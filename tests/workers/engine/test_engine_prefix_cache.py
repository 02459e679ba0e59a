"""Answers that begin from cached blocks equal those of transformers, token for token."""

from __future__ import annotations

import msgspec
import pytest

from epd.types import SamplingParams
from tests.workers.engine.oracle import (
    IMAGE,
    Answers,
    Oracle,
    Prompt,
    add,
    break_token,
    greedy,
    make_engine,
    picture,
    provide,
    run,
)

BLOCK_SIZE = 16
BLOCK_BYTES = BLOCK_SIZE * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, kv heads, head dim, bytes
LONG_TEXT = "the quick brown fox jumps over the lazy dog, what is left? " * 2


def test_the_second_turn_of_a_conversation(any_oracle: Oracle) -> None:
    engine = make_engine(any_oracle.path)
    first = any_oracle.prompt(LONG_TEXT)
    add(engine, "first", first, greedy(40))
    answer = run(engine).tokens["first"]
    second = Prompt(first.token_ids + answer + any_oracle.prompt(" and then?").token_ids, [], [])
    add(engine, "second", second)
    answers = run(engine)
    assert answers.tokens["second"] == any_oracle.generate(second)
    computed = len(first.token_ids) + len(answer) - 1  # nobody has computed the last token
    assert answers.ends["second"].cached_tokens == computed // BLOCK_SIZE * BLOCK_SIZE


def test_the_second_turn_with_a_picture_and_another_one(vision_oracle: Oracle) -> None:
    pictures = [picture(1), picture(2, 60, 150)]
    encoded = [vision_oracle.encode(image, str(index)) for index, image in enumerate(pictures)]
    engine = make_engine(vision_oracle.path, max_num_batched_tokens=16)
    for one in encoded:
        provide(engine, one)
    text = f"user {IMAGE} what is this?"
    add(engine, "first", vision_oracle.prompt(text, encoded[:1]))
    assert run(engine).ends["first"].cached_tokens == 0
    for _ in range(2):
        second = vision_oracle.prompt(f"{text} a fox. and {IMAGE} this?", encoded)
        add(engine, "second", second)
        answers = run(engine)
        assert answers.tokens["second"] == vision_oracle.generate(second, pictures)
    whole = answers.ends["second"]
    assert whole.cached_tokens == (whole.prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_the_same_tokens_with_another_picture_share_only_what_stands_before_it(vision_oracle: Oracle) -> None:
    engine = make_engine(vision_oracle.path)
    text = f"{LONG_TEXT} {IMAGE} what is this?"
    before = len(vision_oracle.prompt(LONG_TEXT).token_ids)
    answers = Answers()
    for seed in range(3):
        image = picture(seed)
        encoded = vision_oracle.encode(image, f"key-{seed}")
        provide(engine, encoded)
        prompt = vision_oracle.prompt(text, [encoded])
        add(engine, str(seed), prompt)
        answers.drain(engine)
        assert answers.tokens[str(seed)] == vision_oracle.generate(prompt, [image])
    assert len({tuple(tokens) for tokens in answers.tokens.values()}) == 3
    assert 0 < answers.ends["2"].cached_tokens <= before + 1


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_and_resumed_beside_others_with_the_same_beginning(vision_oracle: Oracle, caching: bool) -> None:
    images = [picture(seed) for seed in range(2)]
    encoded = [vision_oracle.encode(image, f"key-{seed}") for seed, image in enumerate(images)]
    expected: dict[str, list[int]] = {}
    engine = make_engine(
        vision_oracle.path,
        kv_cache_memory_bytes=12 * BLOCK_BYTES,
        max_model_len=128,
        max_num_batched_tokens=16,
        enable_prefix_caching=caching,
    )
    for one in encoded:
        provide(engine, one)
    for index in range(6):
        prompt = vision_oracle.prompt(f"what is in this picture {IMAGE} of number {index}?", [encoded[index % 2]])
        expected[f"r{index}"] = vision_oracle.generate(prompt, [images[index % 2]], max_tokens=40)
        add(engine, f"r{index}", prompt, greedy(40))
    assert run(engine).tokens == expected
    assert engine.num_preemptions > 0
    load = engine.load()
    assert (load.kv_used_blocks, load.prefix_cache_hits > 0) == (0, caching)


def test_samples_of_one_prompt_compute_it_once_and_differ_by_seed_alone(qwen2: Oracle) -> None:
    prompt = qwen2.prompt(LONG_TEXT)
    sampling = SamplingParams(max_tokens=20)
    alone = make_engine(qwen2.path, enable_prefix_caching=False)
    together = make_engine(qwen2.path)
    expected: dict[str, list[int]] = {}
    for seed in range(4):
        add(alone, str(seed), prompt, replace_seed(sampling, seed))
        expected |= run(alone).tokens
        add(together, str(seed), prompt, replace_seed(sampling, seed))
    answers = run(together)
    assert answers.tokens == expected
    shared = (len(prompt.token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert [answers.ends[str(seed)].cached_tokens for seed in range(4)] == [0, shared, shared, shared]


def replace_seed(sampling: SamplingParams, seed: int) -> SamplingParams:
    return msgspec.structs.replace(sampling, seed=seed)


def test_a_request_that_fails_leaves_nothing_for_others_to_take_over(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path, max_num_batched_tokens=16)
    prompt = qwen2.prompt(LONG_TEXT)
    expected = qwen2.generate(prompt)
    bad = next(token for token in range(1, engine.info.vocab_size) if token not in {*prompt.token_ids, *expected})
    break_token(engine, bad)
    add(engine, "bad", Prompt([*prompt.token_ids, bad], [], []))
    assert run(engine).ends["bad"].error is not None
    add(engine, "good", prompt)
    answers = run(engine)
    assert answers.tokens["good"] == expected
    assert answers.ends["good"].cached_tokens == 0
