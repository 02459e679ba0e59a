"""Raw text completions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.proxy.conftest import Cluster
from tests.proxy.test_chat import events


async def complete(cluster: Cluster, prompt: Any, **fields: Any) -> Any:
    response = await cluster.http.post("/v1/completions", json={"prompt": prompt, **fields})
    return response.json() | {"status": response.status_code}


async def test_seed_document_shape(cluster: Cluster) -> None:
    body = await complete(cluster, "Once upon a time", max_tokens=1, temperature=0.7, stream=False)
    assert body["status"] == 200
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    [choice] = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert "hello world".startswith(choice["text"])
    assert body["usage"]["completion_tokens"] == 1


async def test_default_limit_is_sixteen(cluster: Cluster) -> None:
    await complete(cluster, "x")
    assert cluster.pd.requests[0].sampling.max_tokens == 16


async def test_several_prompts_and_samples(cluster: Cluster) -> None:
    body = await complete(cluster, ["one", "two words"], n=2)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    prompts = [cluster.model.tokenizer.decode(request.prompt_token_ids) for request in cluster.pd.requests]
    assert prompts == ["one", "one", "two words", "two words"]
    tokens = [len(request.prompt_token_ids) for request in cluster.pd.requests]
    assert body["usage"]["prompt_tokens"] == tokens[0] + tokens[2]
    seeds = [request.sampling.seed for request in cluster.pd.requests]
    assert seeds[0] == seeds[2] == seeds[1] - 1 == seeds[3] - 1


@pytest.mark.parametrize(("prompt", "wanted"), [([5, 6, 7], [(5, 6, 7)]), ([[5], [6, 7]], [(5,), (6, 7)])])
async def test_token_prompts(cluster: Cluster, prompt: Any, wanted: list[tuple[int, ...]]) -> None:
    body = await complete(cluster, prompt)
    assert body["status"] == 200
    assert [request.prompt_token_ids for request in cluster.pd.requests] == wanted


async def test_echo_begins_with_the_prompt(cluster: Cluster) -> None:
    body = await complete(cluster, "say: ", echo=True)
    assert body["choices"][0]["text"] == "say: hello world"


async def test_stream(cluster: Cluster) -> None:
    response = await cluster.http.post(
        "/v1/completions",
        json={"prompt": ["a", "b"], "stream": True, "echo": True, "stream_options": {"include_usage": True}},
    )
    chunks = events(response)
    text = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        text[choice["index"]] += choice["text"]
        assert chunk["usage"] is None
    assert text == {0: "ahello world", 1: "bhello world"}
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(cluster.pd.answer)


async def test_openai_client(cluster: Cluster) -> None:
    answer = await cluster.openai.completions.create(model=cluster.name, prompt="x", stop=[" wor"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello", "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": "<|image_pad|>"}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "best_of": 2, "n": 3}, "best_of"),
        ({"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "x", "best_of": 129}, "best_of"),
        ({"prompt": "x", "prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"prompt": ["x"] * 128, "n": 17}, "n"),
        ({"prompt": [5] * 10, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ],
)
async def test_bad_fields_are_named(cluster: Cluster, fields: dict[str, Any], param: str) -> None:
    response = await cluster.http.post("/v1/completions", json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert cluster.pd.requests == []
