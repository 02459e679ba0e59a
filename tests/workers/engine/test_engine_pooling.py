"""Scores and embeddings equal what transformers' own classes compute for the same tokens, alone or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from epd.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from epd.types import FinishReason, Pooling, PoolingKind, SamplingParams, WorkerTask
from tests import checkpoints_text
from tests.workers.engine.fakes import FakeRunner, fake_engine
from tests.workers.engine.oracle import Answers, Oracle, add, greedy, make_engine, run
from workers.engine.engine import Engine

DRAW = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(10, 380, (length,), generator=DRAW).tolist() for length in (1, 2, 9, 16, 33, 70)]
SCORE = Pooling(PoolingKind.SCORE)


def pool(engine: Engine, pooling: Pooling, prompts: Sequence[list[int]] = PROMPTS) -> list[torch.Tensor]:
    """The vectors of `prompts`, which arrive one a step."""
    answers = Answers()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(), pooling=pooling)
        answers.take(engine.step())
    answers.drain(engine)
    for index, prompt in enumerate(prompts):
        end = answers.ends[str(index)]
        assert end.finish_reason is FinishReason.STOP
        assert end.prompt_tokens == len(prompt)
        assert not answers.tokens[str(index)]
    assert engine.load().kv_used_blocks == 0
    return [torch.tensor(answers.ends[str(index)].pooled) for index in range(len(prompts))]


@torch.inference_mode()
def hidden_states(path: Path, prompts: Sequence[list[int]] = PROMPTS) -> list[torch.Tensor]:
    """Final hidden states, normalised by the model's last norm, [tokens, hidden size] each."""
    model: Any = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return [model(input_ids=torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts]


def same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("batched_tokens", [512, 8], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", checkpoints_text.REWARD_CLASSES)
def test_scores(tmp_path: Path, name: str, batched_tokens: int) -> None:
    path = checkpoints_text.build_reward(tmp_path, name)
    model: Any = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    assert len({round(float(score), 3) for score in expected}) == len(PROMPTS)
    assert same(pool(make_engine(path, task=WorkerTask.SCORE, max_num_batched_tokens=batched_tokens), SCORE), expected)


@pytest.mark.parametrize("batched_tokens", [512, 8], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", checkpoints_text.BASE_CLASSES)
def test_embeddings_of_a_checkpoint_without_a_head(tmp_path: Path, name: str, batched_tokens: int) -> None:
    path = checkpoints_text.build_embedding(tmp_path, name)
    states = hidden_states(path)
    engine = make_engine(path, task=WorkerTask.EMBED, max_num_batched_tokens=batched_tokens)
    engine.warm_up()
    last = [state[-1] for state in states]
    mean = [state.mean(dim=0) for state in states]
    assert same(pool(engine, Pooling(PoolingKind.LAST, normalize=False)), last)
    assert same(pool(engine, Pooling(PoolingKind.MEAN, normalize=False)), mean)
    assert same(pool(engine, Pooling(PoolingKind.LAST)), [vector / vector.norm() for vector in last])
    assert same(pool(engine, Pooling(PoolingKind.MEAN)), [vector / vector.norm() for vector in mean])


def test_a_generating_checkpoint_as_an_embedding_model_loses_its_head(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path, task=WorkerTask.EMBED)
    expected = [state[-1] for state in hidden_states(qwen2.path)]
    assert same(pool(engine, Pooling(PoolingKind.LAST, normalize=False)), expected)
    with pytest.raises(InvalidRequest, match="need --task generate"):
        engine.add_request("r", [1, 2], greedy())


def test_a_generating_engine_gives_embeddings_beside_its_tokens(qwen2: Oracle) -> None:
    """In the same steps, prompts in chunks, and without a difference to either."""
    engine = make_engine(qwen2.path, max_num_batched_tokens=16)
    texts = [qwen2.prompt(text) for text in ("what is it?", "red green blue " * 6)]
    for index, text in enumerate(texts):
        add(engine, f"tokens-{index}", text)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(
            f"vector-{index}", prompt, SamplingParams(), pooling=Pooling(PoolingKind.MEAN, normalize=False)
        )
    answers = run(engine)
    assert [answers.tokens[f"tokens-{index}"] for index in range(2)] == [qwen2.generate(text) for text in texts]
    vectors = [torch.tensor(answers.ends[f"vector-{index}"].pooled) for index in range(len(PROMPTS))]
    assert same(vectors, [state.mean(dim=0) for state in hidden_states(qwen2.path)])


def test_a_preempted_mean_counts_no_token_twice(qwen2: Oracle) -> None:
    block_bytes = 16 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, kv heads, head dim, bytes
    engine = make_engine(
        qwen2.path,
        kv_cache_memory_bytes=7 * block_bytes,
        max_model_len=112,
        max_num_seqs=2,
        max_num_batched_tokens=3,
    )
    add(engine, "old", qwen2.prompt("what is it?"), greedy(80))
    answers = Answers()
    for _ in range(3):
        answers.take(engine.step())
    prompt = PROMPTS[-1]
    engine.add_request("new", prompt, SamplingParams(), pooling=Pooling(PoolingKind.MEAN, normalize=False))
    answers.drain(engine)
    assert engine.num_preemptions > 0
    (expected,) = hidden_states(qwen2.path, [prompt])
    assert same([torch.tensor(answers.ends["new"].pooled)], [expected.mean(dim=0)])


def test_a_prompt_may_fill_the_context(qwen2: Oracle) -> None:
    """No token follows, so none needs room."""
    engine = make_engine(qwen2.path, max_model_len=32)
    prompt = PROMPTS[-1][:32]
    (vector,) = pool(engine, Pooling(PoolingKind.LAST, normalize=False), [prompt])
    assert same([vector], [state[-1] for state in hidden_states(qwen2.path, [prompt])])
    with pytest.raises(ContextLengthExceeded):
        engine.add_request("r", PROMPTS[-1][:33], SamplingParams(), pooling=Pooling(PoolingKind.LAST))


def test_a_model_without_a_score_head_invents_no_score(qwen2: Oracle) -> None:
    with pytest.raises(InvalidRequest, match="no reward model"):
        make_engine(qwen2.path).add_request("r", [1], SamplingParams(), pooling=SCORE)


def test_a_reward_model_gives_nothing_but_scores(tmp_path: Path) -> None:
    engine = make_engine(checkpoints_text.build_reward(tmp_path, "qwen2"), task=WorkerTask.SCORE)
    for pooling in (None, Pooling(PoolingKind.LAST)):
        with pytest.raises(InvalidRequest, match="This model gives scores"):
            engine.add_request("r", [1], SamplingParams(), pooling=pooling)


@pytest.mark.parametrize(
    ("build", "task", "message"),
    [
        (lambda path: checkpoints_text.build_reward(path, "qwen2"), "generate", "start it with --task score"),
        (lambda path: checkpoints_text.build_reward(path, "qwen2"), "embed", "start it with --task score"),
        (lambda path: checkpoints_text.build_reward(path, "qwen2", num_labels=3), "score", "one label.* has 3"),
        (lambda path: checkpoints_text.build(path, "qwen2"), "score", "ForSequenceClassification.*Qwen2ForCausalLM"),
        (lambda path: checkpoints_text.build_embedding(path, "qwen3"), "generate", "start it with --task embed"),
    ],
)
def test_checkpoint_and_task_must_fit(tmp_path: Path, build: Any, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(build(tmp_path), task=WorkerTask(task))


def test_values_that_overflowed_fail_the_request_and_not_its_neighbour(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path)
    runner: Any = engine._runner
    runner._forward._model._embed.weight.data[7] = float("nan")
    for name, prompt in (("bad", [7, 8]), ("good", [8, 9])):
        engine.add_request(name, prompt, SamplingParams(), pooling=Pooling(PoolingKind.MEAN))
    ends = run(engine).ends
    assert ends["bad"].error is not None
    assert ends["bad"].error.code == "internal_error"
    assert len(ends["good"].pooled) == engine.info.hidden_size


def test_each_vector_comes_with_the_one_end_of_its_request() -> None:
    engine = fake_engine(FakeRunner())
    for length in (3, 5):
        engine.add_request(str(length), [1] * length, SamplingParams(), pooling=Pooling(PoolingKind.LAST))
    ends = run(engine).ends
    assert {name: end.pooled for name, end in ends.items()} == {"3": (3.0,), "5": (5.0,)}
