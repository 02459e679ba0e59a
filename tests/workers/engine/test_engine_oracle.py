"""Greedy answers of the engine equal `model.generate` of the whole model, token for token."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.workers.engine.oracle import IMAGE, Answers, Oracle, add, greedy, make_engine, picture, provide, run

LONG_TEXT = "the quick brown fox jumps over the lazy dog, what is left? " * 8


@pytest.mark.parametrize("text", ["a", "describe the image in one word", LONG_TEXT])
def test_text(any_oracle: Oracle, text: str) -> None:
    engine = make_engine(any_oracle.path)
    prompt = any_oracle.prompt(text)
    add(engine, "r", prompt)
    answers = run(engine)
    assert answers.tokens["r"] == any_oracle.generate(prompt)
    assert answers.ends["r"].prompt_tokens == len(prompt.token_ids)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (f"user {IMAGE} what is this?", [(90, 70)]),
        (f"{IMAGE}", [(200, 60)]),
        (f"compare {IMAGE}{IMAGE} now", [(90, 70), (60, 150)]),
        (f"first {IMAGE} is red, second {IMAGE} is green, third {IMAGE} is?", [(90, 70), (56, 56), (64, 200)]),
        (
            f"<|im_start|>user\n{IMAGE}what?<|im_end|>\n<|im_start|>assistant\na fox<|im_end|>\n"
            f"<|im_start|>user\nand {IMAGE} here?<|im_end|>\n<|im_start|>assistant\n",
            [(90, 70), (120, 80)],
        ),
    ],
    ids=["one", "only", "adjacent", "interleaved", "turns"],
)
@pytest.mark.parametrize("batched_tokens", [512, 8])
def test_pictures(vision_oracle: Oracle, text: str, sizes: list[tuple[int, int]], batched_tokens: int) -> None:
    pictures = [picture(index, *size) for index, size in enumerate(sizes)]
    encoded = [vision_oracle.encode(image, f"key-{index}") for index, image in enumerate(pictures)]
    prompt = vision_oracle.prompt(text, encoded)
    engine = make_engine(vision_oracle.path, max_num_batched_tokens=batched_tokens)
    add(engine, "r", prompt)
    answers = Answers()
    for one in encoded:
        assert not answers.drain(engine).tokens  # what stands before the picture may be computed
        provide(engine, one)
    answers.drain(engine)
    assert answers.tokens["r"] == vision_oracle.generate(prompt, pictures)
    expanded = len(prompt.token_ids) + sum(len(one.token_ids) - 1 for one in encoded)
    assert answers.ends["r"].prompt_tokens == expanded


def test_answers_depend_on_the_picture(vision_oracle: Oracle) -> None:
    engine = make_engine(vision_oracle.path)
    for seed in range(6):
        encoded = vision_oracle.encode(picture(seed), str(seed))
        provide(engine, encoded)
        add(engine, str(seed), vision_oracle.prompt(f"user {IMAGE} what is this?", [encoded]))
    answers = run(engine)
    assert len({tuple(tokens) for tokens in answers.tokens.values()}) == 6


def test_the_same_picture_twice_in_one_prompt(vision_oracle: Oracle) -> None:
    image = picture(3)
    encoded = vision_oracle.encode(image, "k")
    prompt = vision_oracle.prompt(f"{IMAGE} again {IMAGE} is it?", [encoded, encoded])
    engine = make_engine(vision_oracle.path)
    add(engine, "r", prompt)
    provide(engine, encoded)
    assert run(engine).tokens["r"] == vision_oracle.generate(prompt, [image, image])


def test_eight_requests_in_staggered_order(vision_oracle: Oracle) -> None:
    """Some with pictures, which come before, with, or after the request; prompts in chunks beside decoding rows."""
    engine = make_engine(vision_oracle.path, max_num_batched_tokens=32)
    expected: dict[str, list[int]] = {}
    answers = Answers()
    late = []
    for index in range(8):
        name = f"r{index}"
        pictures = [picture(10 * index + k, 60 + 20 * index, 80) for k in range(index % 3)]
        encoded = [vision_oracle.encode(image, f"{name}-{k}") for k, image in enumerate(pictures)]
        text = f"number {index} " * (1 + 3 * index) + f"{IMAGE} and " * len(pictures) + "what?"
        prompt = vision_oracle.prompt(text, encoded)
        expected[name] = vision_oracle.generate(prompt, pictures, max_tokens=10 + index)
        if index % 2:
            late += encoded
        else:
            for one in encoded:
                provide(engine, one)
        add(engine, name, prompt, greedy(10 + index))
        for _ in range(index % 3):
            answers.take(engine.step())
    for one in reversed(late):
        provide(engine, one)
        answers.take(engine.step())
    assert answers.drain(engine).tokens == expected
    assert engine.load().kv_used_blocks == 0


def test_preemption_loses_and_repeats_nothing(vision_oracle: Oracle) -> None:
    image = picture(1)
    encoded = vision_oracle.encode(image, "k")
    texts = [f"number {index} {IMAGE} of " * (index % 2) + f"what {index}" for index in range(6)]
    prompts = [vision_oracle.prompt(text, [encoded] * (index % 2)) for index, text in enumerate(texts)]
    expected = {
        f"r{index}": vision_oracle.generate(prompt, [image] * (index % 2), max_tokens=40)
        for index, prompt in enumerate(prompts)
    }
    block_bytes = 16 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, kv heads, head dim, bytes
    engine = make_engine(
        vision_oracle.path, kv_cache_memory_bytes=12 * block_bytes, max_model_len=128, max_num_batched_tokens=16
    )
    assert engine.load().kv_total_blocks == 12
    provide(engine, encoded)
    for index, prompt in enumerate(prompts):
        add(engine, f"r{index}", prompt, greedy(40))
    assert run(engine).tokens == expected
    assert engine.num_preemptions > 0


def test_text_may_hold_an_image_token(vision_oracle: Oracle) -> None:
    """Positions and rows follow from the spans, so a stray image token in user text is text and harms nothing."""
    image = picture(2)
    encoded = vision_oracle.encode(image, "k")
    prompt = vision_oracle.prompt(f"user {IMAGE} what is this?", [encoded])
    prompt.token_ids.insert(0, vision_oracle.image_token_id)
    placeholder = prompt.placeholders[0]
    prompt.placeholders = [type(placeholder)("k", placeholder.offset + 1)]
    engine = make_engine(vision_oracle.path)
    provide(engine, encoded)
    add(engine, "r", prompt)
    answers = run(engine)
    assert len(answers.tokens["r"]) == 12
    assert answers.ends["r"].error is None


@pytest.mark.parametrize("batched_tokens", [512, 16])
def test_sliding_windows(qwen2: Oracle, tmp_path: Path, batched_tokens: int) -> None:
    """Prompts shorter than the window, a little longer, and several times as long, in one batch."""
    path = shutil.copytree(qwen2.path, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    (path / "config.json").write_text(json.dumps(config))
    oracle = Oracle(path)
    engine = make_engine(path, max_num_batched_tokens=batched_tokens)
    prompts = {text: oracle.prompt(text) for text in ("a red", "what is in this picture? " * 4, LONG_TEXT)}
    assert [len(prompt.token_ids) // 24 for prompt in prompts.values()] == [0, 1, 5]
    for text, prompt in prompts.items():
        add(engine, text, prompt, greedy(30))
    expected = {text: oracle.generate(prompt, max_tokens=30) for text, prompt in prompts.items()}
    assert run(engine).tokens == expected
    assert expected[LONG_TEXT] != qwen2.generate(prompts[LONG_TEXT], max_tokens=30), "the window makes no difference"


def test_text_only_model_in_bfloat16_runs(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path, dtype="bfloat16")
    assert engine.info.dtype is torch.bfloat16
    add(engine, "r", qwen2.prompt("what is it?"))
    assert len(run(engine).tokens["r"]) == 12


def test_answer_ends_at_the_models_own_eos(qwen2: Oracle) -> None:
    prompt = qwen2.prompt("describe")
    expected = qwen2.generate(prompt)
    engine = make_engine(qwen2.path)
    eos = expected[4]
    first = expected.index(eos)
    engine.info = replace(engine.info, eos_token_ids=frozenset({eos}))
    add(engine, "r", prompt)
    answers = run(engine)
    assert answers.tokens["r"] == expected[: first + 1]
    assert answers.ends["r"].stop_token_id == eos
