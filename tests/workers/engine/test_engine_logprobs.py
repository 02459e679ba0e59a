"""Log probabilities of answers and prompts against transformers' forward pass in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epd import limits
from epd.types import FinishReason, SamplingParams, TokenLogprobs
from tests.workers.engine.oracle import Answers, Oracle, Prompt, add, make_engine, picture, provide, run
from workers.engine.logprobs import logprobs_of

TEXT = 2 * "the quick brown fox jumps over the lazy dog. what is in this picture? describe the image in one word"
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4


@torch.inference_mode()
def expected_logprobs(oracle: Oracle, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]; row i is about token i + 1."""
    logprobs: torch.Tensor = oracle.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    return logprobs


def check(given: TokenLogprobs, token: int, expected: torch.Tensor, num_top: int) -> None:
    assert given.token_id == token
    assert given.logprob == pytest.approx(expected[token].item(), abs=1e-4)
    assert given.rank == int((expected > expected[token]).sum()) + 1
    values, ids = expected.topk(num_top)
    assert [token for token, _ in given.top] == ids.tolist()
    assert [value for _, value in given.top] == pytest.approx(values.tolist(), abs=1e-4)


def all_logprobs(answers: Answers, name: str) -> tuple[list[TokenLogprobs], list[Any]]:
    outputs = answers.outputs[name]
    with_prompt = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
    return [entry for output in outputs for entry in output.logprobs], with_prompt


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_the_answer(qwen2: Oracle, temperature: float) -> None:
    prompt = qwen2.prompt(TEXT)
    engine = make_engine(qwen2.path)
    settings: dict[str, Any] = {"temperature": temperature, "max_tokens": 12, "seed": 5}
    add(engine, "asks", prompt, SamplingParams(logprobs=4, presence_penalty=1.0, **settings))
    add(engine, "asks_not", prompt, SamplingParams(**settings))
    answers = run(engine)
    given, _ = all_logprobs(answers, "asks")
    tokens = answers.tokens["asks"]
    expected = expected_logprobs(qwen2, prompt.token_ids + tokens)[len(prompt.token_ids) - 1 :]
    assert len(given) == len(tokens) == 12
    for entry, token, row in zip(given, tokens, expected, strict=False):
        check(entry, token, row, 4)
    assert all_logprobs(answers, "asks_not") == ([], [])


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 8}, {"max_num_batched_tokens": 3, "max_num_seqs": 3}],
    ids=["whole", "chunked", "small chunks"],
)
def test_of_the_prompt(qwen2: Oracle, settings: dict[str, Any]) -> None:
    prompt = qwen2.prompt(TEXT)
    engine = make_engine(qwen2.path, **settings)
    add(engine, "neighbour", qwen2.prompt("number"), SamplingParams(temperature=0, max_tokens=30))
    add(engine, "asks", prompt, SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2))
    answers = run(engine)
    _, [given] = all_logprobs(answers, "asks")  # once
    assert answers.outputs["asks"][0].prompt_logprobs  # with the first output
    expected = expected_logprobs(qwen2, prompt.token_ids)
    assert len(given) == len(prompt.token_ids) > 32  # more than go through the head at once
    assert given[0] is None
    for entry, token, row in zip(given[1:], prompt.token_ids[1:], expected, strict=False):
        check(entry, token, row, 2)


def test_of_a_prompt_with_a_picture(qwen2_5_vl: Oracle) -> None:
    image = picture(1)
    encoded = qwen2_5_vl.encode(image, "a")
    prompt = qwen2_5_vl.prompt("<|vision_start|><|image_pad|><|vision_end|>what is it?", [encoded])
    engine = make_engine(qwen2_5_vl.path, max_num_batched_tokens=8)
    add(engine, "a", prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    provide(engine, encoded)
    answers = run(engine)
    _, [given] = all_logprobs(answers, "a")
    assert len(given) == answers.ends["a"].prompt_tokens == len(prompt.token_ids) + len(encoded.token_ids) - 1
    assert [entry.token_id for entry in given if entry][-4:] == prompt.token_ids[-4:]


def test_of_a_prompt_that_pictures_make_too_long(qwen2_5_vl: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would not fit into a message, and nobody would hear of the request again."""
    encoded = qwen2_5_vl.encode(picture(1), "a")
    prompt = qwen2_5_vl.prompt("<|vision_start|><|image_pad|><|vision_end|>what is it?", [encoded])
    monkeypatch.setattr(limits, "MAX_PROMPT_LOGPROBS", 3 * len(prompt.token_ids))
    engine = make_engine(qwen2_5_vl.path)
    add(engine, "a", prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
    provide(engine, encoded)
    error = run(engine).ends["a"].error
    assert error is not None
    assert (error.code, error.param) == ("invalid_request", "prompt_logprobs")


def test_of_a_prompt_alone_without_an_answer(qwen2: Oracle) -> None:
    prompt = qwen2.prompt(TEXT)
    engine = make_engine(qwen2.path, max_num_batched_tokens=16)
    add(engine, "asks", prompt, SamplingParams(max_tokens=0, prompt_logprobs=1))
    add(engine, "asks_not", prompt, SamplingParams(max_tokens=0))
    answers = run(engine)
    for name in ("asks", "asks_not"):
        assert answers.tokens[name] == []
        assert answers.ends[name].finish_reason is FinishReason.LENGTH
        assert answers.ends[name].prompt_tokens == len(prompt.token_ids)
    _, [given] = all_logprobs(answers, "asks")
    assert len(given) == len(prompt.token_ids)
    assert all_logprobs(answers, "asks_not") == ([], [])


def test_one_token_has_nothing_before_it(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path)
    add(engine, "a", Prompt([5], [], []), SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert all_logprobs(run(engine), "a")[1] == [(None,)]


def test_preempted_requests_get_the_same_once(qwen2: Oracle) -> None:
    wide = make_engine(qwen2.path)
    tight = make_engine(qwen2.path, kv_cache_memory_bytes=9 * BLOCK_BYTES, max_model_len=96, max_num_batched_tokens=8)
    results = []
    for engine in (wide, tight):
        for index in range(4):
            sampling = SamplingParams(seed=index, max_tokens=30, logprobs=1, prompt_logprobs=1)
            add(engine, f"r{index}", qwen2.prompt(f"number {index} of the dogs is"), sampling)
        answers = run(engine)
        results.append({name: all_logprobs(answers, name) for name in sorted(answers.tokens)})
        assert all(len(prompts) == 1 for _, prompts in results[-1].values())
    assert tight.num_preemptions > 0
    for (one, [one_prompt]), (other, [other_prompt]) in zip(results[0].values(), results[1].values(), strict=True):
        for a, b in zip([*one, *one_prompt[1:]], [*other, *other_prompt[1:]], strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_a_prompt_that_is_begun_again_is_told_once_and_whole(qwen2: Oracle) -> None:
    prompt = qwen2.prompt(TEXT)
    engine = make_engine(qwen2.path, max_num_batched_tokens=8)
    add(engine, "a", prompt, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1))
    engine.step()
    engine.step()
    engine._scheduler._preempt(engine._requests["a"])
    _, [given] = all_logprobs(run(engine), "a")
    expected = expected_logprobs(qwen2, prompt.token_ids)
    assert len(given) == len(prompt.token_ids)
    for entry, token, row in zip(given[1:], prompt.token_ids[1:], expected, strict=False):
        check(entry, token, row, 1)


def test_an_aborted_request_leaves_nothing_behind(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path, max_num_batched_tokens=8)
    add(engine, "a", qwen2.prompt(TEXT), SamplingParams(max_tokens=3, prompt_logprobs=2))
    engine.step()
    engine.abort("a")
    answers = run(engine)
    assert answers.ends["a"].prompt_logprobs == ()
    runner: Any = engine._runner
    assert runner._prompt_logprobs._known == {}


def test_which_of_equals_are_listed_does_not_depend_on_the_batch() -> None:
    logits = (3 * torch.randn(100, 30_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    greedy = logits.float().argmax(dim=-1).tolist()
    alone = [logprobs_of(row[None], [token], [5])[0] for row, token in zip(logits, greedy, strict=True)]
    assert [one.top[0][0] for one in alone] == greedy
    assert logprobs_of(logits, greedy, [0, 20, *[5] * 98])[2:] == alone[2:]
    assert logprobs_of(logits[:1], greedy[:1], [0])[0].top == ()
