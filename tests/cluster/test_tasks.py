"""Scores and embeddings through the real processes equal those of transformers' own classes."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests import checkpoints_text
from tests.cluster.harness import ROOT, Cluster, running

TEXTS = [
    "what is this?",
    "the quick brown fox jumps over the lazy dog " * 4,
    "red",
    "<|im_start|>user\nblue<|im_end|>\n",
]
CHUNKS = ["--max-num-batched-tokens", "16", "--max-num-seqs", "8"]


def token_ids(model: Path, *texts: str) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return torch.tensor([tokenizer(*texts)["input_ids"]])


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("reward")
    model = checkpoints_text.build_reward(folder / "model", "llama3")
    with running(Cluster(folder, model, encoders=0, pd_flags=["--task", "score", *CHUNKS])) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A checkpoint that gives embeddings and nothing else."""
    folder = tmp_path_factory.mktemp("embed")
    model = checkpoints_text.build_embedding(folder / "model", "qwen3")
    with running(Cluster(folder, model, encoders=0, pd_flags=["--task", "embed", *CHUNKS])) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def generating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A mixture of experts that gives tokens, and embeddings as well."""
    folder = tmp_path_factory.mktemp("generate")
    model = checkpoints_text.build(folder / "model", "qwen3_moe")
    with running(Cluster(folder, model, encoders=0, pd_flags=CHUNKS)) as cluster:
        yield cluster


@pytest.fixture(params=["headless", "generating"])
def embedding(request: pytest.FixtureRequest) -> Cluster:
    cluster: Cluster = request.getfixturevalue(request.param)
    return cluster


def test_scores(reward: Cluster) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(reward.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        alone = [float(model(input_ids=token_ids(reward.model, text)).logits[0, 0]) for text in TEXTS]
        pairs = [float(model(input_ids=token_ids(reward.model, "what", text)).logits[0, 0]) for text in TEXTS]
    answers = [reward.post("/get_score", {"chat": text, "parameters": {}})[1] for text in TEXTS]
    assert [answer["score"] for answer in answers] == pytest.approx(alone, abs=1e-4)
    assert [answer["prompt_tokens"] for answer in answers] == [token_ids(reward.model, t).shape[1] for t in TEXTS]
    _, answer = reward.post("/v1/score", {"text_1": "what", "text_2": TEXTS})
    assert [one["score"] for one in answer["data"]] == pytest.approx(pairs, abs=1e-4)


def test_a_reward_model_chats_with_nobody(reward: Cluster) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    status, answer = reward.post("/v1/chat/completions", body)
    assert (status, "--task generate" in answer["message"]) == (400, True)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings(embedding: Cluster, pooling: str) -> None:
    model: Any = AutoModel.from_pretrained(embedding.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = [model(input_ids=token_ids(embedding.model, text)).last_hidden_state[0] for text in TEXTS]
    vectors = [state[-1] if pooling == "last" else state.mean(dim=0) for state in states]
    with embedding.client() as client:
        answer = client.embeddings.create(model="test-model", input=TEXTS, extra_body={"pooling": pooling})
    assert answer.usage.prompt_tokens == sum(map(len, states))
    for one, vector in zip(answer.data, vectors, strict=True):
        assert one.embedding == pytest.approx((vector / vector.norm()).tolist(), abs=1e-4)


def test_an_embedding_cluster_after_its_requests(embedding: Cluster) -> None:
    pong = embedding.ping(embedding.pd_addresses[0])
    assert pong.load.kv_used_blocks == 0
    assert pong.counters["integrity_failures"] == 0
    assert "WARNING" not in embedding.processes["pd_0"].log_text()


def test_tokens_beside_embeddings(generating: Cluster) -> None:
    """All at once, in the same steps."""
    model: Any = AutoModelForCausalLM.from_pretrained(generating.model, dtype=torch.float32).eval()
    prompts = [token_ids(generating.model, text) for text in TEXTS]
    expected = [model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :] for prompt in prompts]

    async def ask() -> tuple[Any, Any]:
        async with generating.async_client() as client:
            texts = client.completions.create(
                model="test-model", prompt=TEXTS, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
            )
            return await asyncio.gather(texts, client.embeddings.create(model="test-model", input=TEXTS * 8))

    completion, vectors = asyncio.run(ask())
    assert [choice.token_ids for choice in completion.choices] == [tokens.tolist() for tokens in expected]
    assert len(vectors.data) == 8 * len(TEXTS)


PRINTED_REWARD_CLIENT = ROOT / "tests" / "clients" / "documents" / "lightllm_native" / "get_score.py"
"""As LightLLM's document prints it."""


def test_the_printed_client_reads_a_score(reward: Cluster) -> None:
    code = PRINTED_REWARD_CLIENT.read_text().replace("127.0.0.1:8080", f"127.0.0.1:{reward.port}")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout.decode()
    assert printed.startswith("Result: ")
    answer = ast.literal_eval(printed.removeprefix("Result: "))
    assert set(answer) == {"score", "prompt_tokens", "finish_reason"}
    assert isinstance(answer["score"], float)
