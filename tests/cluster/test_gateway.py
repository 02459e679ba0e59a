"""The unified gateway in front of two real models: what its document prints, sent as printed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from epd.demo import CHECKPOINT_DIR
from tests import checkpoints_text
from tests.cluster.harness import Cluster, Process, running

DEMO, TINY = "test-model", "tiny"
ALIASES = {"qwen2": DEMO, "llama3": TINY}
SCENARIOS = """
[scenarios.capital]
user = "What is the capital of {inputs}?"
[aliases]
qwen2 = "test-model"
"""
PRINTED: tuple[dict[str, Any], ...] = (
    {
        "model_id": "qwen2",
        "inputs": "请用中文介绍你自己",
        "parameters": {"max_new_tokens": 128, "temperature": 0.7, "top_p": 0.9},
    },
    {
        "model_id": "llama3",
        "inputs": "牛顿三大定律是什么？",
        "scenario": "qa",
        "parameters": {"max_new_tokens": 200, "temperature": 0.5},
    },
    {
        "model_id": "qwen2",
        "inputs": "人工智能是计算机科学的一个分支，旨在创建能够执行通常需要人类智能的任务的系统……",
        "scenario": "summarize",
        "parameters": {"max_new_tokens": 100},
    },
    {
        "model_id": "llama3",
        "inputs": "这个产品非常好，大家都很喜欢。",
        "scenario": "rewrite",
        "parameters": {"max_new_tokens": 64, "temperature": 0.9},
    },
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Text only: a PD of the demo model and one of a tiny Llama, each under an alias."""
    folder = tmp_path_factory.mktemp("gateway")
    checkpoints_text.build(folder / "models" / TINY, "llama3")
    scenarios = folder / "scenarios.toml"
    scenarios.write_text(
        '[scenarios.capital]\nuser = "What is the capital of {inputs}?"\n[aliases]\nqwen2 = "test-model"'
    )
    flags = ["--models", str(folder / "models"), "--scenarios", str(scenarios), "--model-alias", f"llama3={TINY}"]
    cluster = Cluster(folder, CHECKPOINT_DIR, encoders=0, announce=True, proxy_flags=flags)
    arguments = list(cluster.processes["pd_0"].arguments)
    arguments[arguments.index("--model") + 1] = str(folder / "models" / TINY)
    arguments[arguments.index("--worker-addr") + 1] = str(folder / "pd_tiny")
    cluster.processes["pd_tiny"] = Process("pd_tiny", arguments, folder / "pd_tiny.log")
    with running(cluster):
        cluster.wait_for("/v1/models", lambda body: len(body["models"]) == 4)
        yield cluster


@pytest.mark.parametrize("body", PRINTED)
def test_the_printed_requests(cluster: Cluster, body: dict[str, Any]) -> None:
    status, answer = cluster.post("/v1/generate", body)
    assert status == 200, answer
    assert answer["model"] == ALIASES[body["model_id"]]
    assert isinstance(answer["generated_text"], str)
    assert 0 < answer["tokens"] <= body["parameters"]["max_new_tokens"]


def test_a_scenario_of_the_operators_asks_the_demo_model(cluster: Cluster) -> None:
    body = {"model_id": "qwen2", "inputs": "France", "scenario": "capital", "parameters": {"do_sample": False}}
    assert cluster.post("/v1/generate", body)[1]["generated_text"] == "The capital of France is Paris."


@pytest.mark.parametrize("model", ALIASES)
def test_a_scenario_is_the_chat_with_its_instruction(cluster: Cluster, model: str) -> None:
    """Each by its own model, token for token."""
    instruction = (
        "Answer the question of the user accurately and concisely, in the language of the question. "
        "If you do not know the answer, say so."
    )
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": "Who are you?"}]
    asked = {"model_id": model, "inputs": "Who are you?", "scenario": "qa"}
    limits = {"max_new_tokens": 12, "temperature": 0}
    _, answer = cluster.post("/v1/generate", asked | {"parameters": limits})
    _, chat = cluster.post(
        "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    )
    assert answer["generated_text"] == chat["choices"][0]["message"]["content"] != ""
    assert (answer["tokens"], answer["model"]) == (chat["usage"]["completion_tokens"], chat["model"])
    assert answer["model"] == ALIASES[model]


def test_models_are_listed_and_probed(cluster: Cluster) -> None:
    _, body = cluster.get("/v1/models")
    assert {one["id"]: one["name"] for one in body["models"]} == ALIASES | {DEMO: DEMO, TINY: TINY}
    status, full = cluster.get("/health/full")
    assert status == 200
    # The demo model reads pictures, and has no encoder here.
    assert full["details"] == {DEMO: "degraded", "qwen2": "degraded", TINY: "healthy", "llama3": "healthy"}
    assert (full["total"], full["healthy"]) == (4, 2)


def test_an_unknown_model_and_a_prompt_that_is_too_long(cluster: Cluster) -> None:
    status, body = cluster.post("/v1/generate", {"model_id": "gpt", "inputs": "x"})
    assert (status, body["error_code"]) == (400, "MODEL_NOT_FOUND")
    status, body = cluster.post("/v1/generate", {"model_id": "llama3", "inputs": "word " * 20_000})
    assert (status, body["error_code"]) == (400, "CONTEXT_LENGTH_EXCEEDED")
