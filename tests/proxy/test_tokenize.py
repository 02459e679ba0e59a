"""`/tokenize`, `/detokenize`, and what the server says of itself."""

from __future__ import annotations

import re
from typing import Any

import pytest

from proxy.api.operations import tokenize
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster, ClusterFactory, ask, png


async def post(cluster: Cluster, path: str, **body: Any) -> tuple[int, Any]:
    response = await cluster.http.post(path, json=body)
    return response.status_code, response.json()


async def test_a_text_and_back(cluster: Cluster, tokenizer: Tokenizer) -> None:
    text = "hello wörld 🙂 <|im_start|>"
    status, body = await post(cluster, "/tokenize", model=cluster.name, prompt=text)
    assert status == 200
    assert body == {
        "count": len(body["tokens"]),
        "max_model_len": 4096,
        "tokens": tokenizer.encode(text),
        "token_strs": None,
    }
    assert await post(cluster, "/detokenize", model=cluster.name, tokens=body["tokens"]) == (200, {"prompt": text})


async def test_names_of_tokens(cluster: Cluster) -> None:
    _, body = await post(cluster, "/tokenize", prompt="hello world", return_token_strs=True)
    assert body["token_strs"] == ["hello", "Ġworld"]


async def test_a_conversation_has_the_tokens_that_a_chat_has(cluster: Cluster) -> None:
    messages = [{"role": "system", "content": "you are"}, *ask("hello <|im_end|>", png())]
    status, body = await post(cluster, "/tokenize", messages=messages)
    assert status == 200
    await cluster.http.post("/v1/chat/completions", json={"messages": messages})
    assert tuple(body["tokens"]) == cluster.pd.requests[-1].prompt_token_ids


@pytest.mark.parametrize(
    "fields",
    [
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"add_special_tokens": True},
        {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]},
    ],
)
async def test_what_shapes_prompts_does_so_as_in_chats(cluster: Cluster, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello wor"}]
    status, body = await post(cluster, "/tokenize", messages=messages, **fields)
    assert status == 200
    await cluster.http.post("/v1/chat/completions", json={"messages": messages} | fields)
    assert tuple(body["tokens"]) == cluster.pd.requests[-1].prompt_token_ids


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_what_is_long_is_done_elsewhere_and_has_a_limit(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    long = {"prompt": "hello " * 5000} if path == "/tokenize" else {"tokens": [5] * 30_000}  # beyond the context
    status, body = await post(cluster, path, **long)
    assert status == 200, body
    monkeypatch.setattr(tokenize, "MAX_CHARACTERS", 10_000)
    status, body = await post(cluster, path, **long)
    assert (status, body["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [], "continue_final_message": True}, "messages"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": "x"}, "chat_template"),
        ("/detokenize", {"tokens": [100_000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**64]}, "tokens[0]"),
    ],
)
async def test_what_is_wrong(cluster: Cluster, path: str, body: dict[str, Any], param: str) -> None:
    status, answer = await post(cluster, path, **body)
    assert (status, answer["error"]["param"]) == (400, param), answer


async def test_an_empty_text_has_no_tokens(cluster: Cluster) -> None:
    assert (await post(cluster, "/tokenize", prompt=""))[1]["count"] == 0
    assert await post(cluster, "/detokenize", tokens=[]) == (200, {"prompt": ""})


async def test_the_server_tells_what_it_is_and_nothing_else(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(
        served_model_name="m", model_alias=("short=m",), admin_key="operator", api_key=("clients",)
    )
    cluster.http.headers["authorization"] = "Bearer clients"
    response = await cluster.http.get("/server_info")
    body = response.json()
    (model,) = body["models"]
    assert (model["id"], model["aliases"], model["max_model_len"]) == ("m", ["short"], 4096)
    assert body["limits"]["max_body_bytes"] == cluster.service.config.max_body_bytes
    assert "qa" in body["scenarios"]
    assert not re.search("ipc:|operator|clients|/tmp", response.text)
    cluster.http.headers["authorization"] = "Bearer operator"
    workers = (await cluster.http.get("/server_info")).json()["workers"]
    assert {one["address"] for one in workers} == {cluster.pd.address, cluster.encoder.address}
    info = (await cluster.http.get("/info")).json()
    assert (info["model_id"], info["max_total_tokens"]) == ("m", 4096)


async def test_load_counts_requests_in_work(cluster: Cluster) -> None:
    assert (await cluster.http.get("/load")).json() == {"server_load": 0}
    with cluster.service.dispatcher.admit():
        assert (await cluster.http.get("/load")).json() == {"server_load": 1}
