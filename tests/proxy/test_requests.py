"""What is refused, and how: by table."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.proxy.conftest import Cluster, ClusterFactory, ask, data_url, png
from tests.proxy.model_files import write_model

HI = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


def assert_error(body: Any, status: int, *, code: str | None = None, param: str | None = None) -> None:
    """The superset shape: OpenAI's object, and the flat keys of other dialects."""
    assert set(body) == {"error", "object", "message", "type", "code", "param"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["object"], body["code"]) == ("error", status)
    assert body["message"] == body["error"]["message"]
    assert body["message"]
    if code is not None:
        assert body["error"]["code"] == code
    if param is not None:
        assert body["error"]["param"] == param


BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({}, "messages"),
    ({"messages": 5}, "messages"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens"),
    ({"messages": HI, "max_tokens": -1}, "max_tokens"),
    ({"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": HI, "max_tokens": 2.5}, "max_tokens"),
    ({"messages": HI, "temperature": "0.7"}, "temperature"),
    ({"messages": HI, "temperature": 2.1}, "temperature"),
    ({"messages": HI, "temperature": -0.1}, "temperature"),
    ({"messages": HI, "top_p": 0}, "top_p"),
    ({"messages": HI, "top_p": 1.1}, "top_p"),
    ({"messages": HI, "top_k": -2}, "top_k"),
    ({"messages": HI, "min_p": 2}, "min_p"),
    ({"messages": HI, "n": 0}, "n"),
    ({"messages": HI, "n": 129}, "n"),
    ({"messages": HI, "n": True}, "n"),
    ({"messages": HI, "seed": 2**63}, "seed"),
    ({"messages": HI, "stop": ""}, "stop"),
    ({"messages": HI, "stop": ["a", ""]}, "stop"),
    ({"messages": HI, "stop": ["x"] * 17}, "stop"),
    ({"messages": HI, "stop": 5}, "stop"),
    ({"messages": HI, "stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"messages": HI, "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": HI, "presence_penalty": 2.5}, "presence_penalty"),
    ({"messages": HI, "frequency_penalty": -2.1}, "frequency_penalty"),
    ({"messages": HI, "repetition_penalty": 0}, "repetition_penalty"),
    ({"messages": HI, "logit_bias": {"5": 101}}, "logit_bias[...]"),
    ({"messages": HI, "logit_bias": {"100000": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {"hello": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {"-1": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"messages": HI, "bad_words": [""]}, "bad_words"),
    ({"messages": HI, "bad_words": ["x"] * 257}, "bad_words"),
    ({"messages": HI, "bad_words": ["x" * 257]}, "bad_words"),
    ({"messages": HI, "bad_words": [5]}, "bad_words[0]"),
    ({"messages": HI, "allowed_token_ids": []}, "allowed_token_ids"),
    ({"messages": HI, "allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ({"messages": HI, "allowed_token_ids": [5] * 400}, "allowed_token_ids"),  # there are fewer
    ({"messages": HI, "stop_token_ids": [5] * 400}, "stop_token_ids"),
    ({"messages": HI, "logprobs": 3}, "logprobs"),
    ({"messages": HI, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": HI, "logprobs": False, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": HI, "prompt_logprobs": 21}, "prompt_logprobs"),
    ({"messages": HI, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"messages": HI, "priority": "high"}, "priority"),
    ({"messages": HI, "use_beam_search": True}, "use_beam_search"),
    ({"messages": HI, "length_penalty": 0}, "length_penalty"),
    ({"messages": HI, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"messages": HI, "kv_transfer_params": {"host": "x"}}, "kv_transfer_params"),
    ({"messages": HI, "response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": HI, "response_format": {}}, "response_format.type"),
    ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"messages": HI, "response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"messages": HI, "structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"messages": HI, "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"messages": HI, "structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"messages": HI, "guided_choice": ["a", ""]}, "guided_choice"),
    ({"messages": HI, "guided_whitespace_pattern": "x"}, "guided_whitespace_pattern"),
    ({"messages": HI, "tools": [{"type": "function"}]}, "tools[0].function"),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
    ({"messages": HI, "functions": [{}]}, "functions[0].name"),
    ({"messages": HI, "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"messages": HI, "truncation_side": "left"}, "truncation_side"),
    ({"messages": HI, "cache_salt": ""}, "cache_salt"),
    ({"messages": HI, "cache_salt": "a@b"}, "cache_salt"),
    ({"messages": HI, "cache_salt": "x" * 129}, "cache_salt"),
    ({"messages": HI, "request_id": "a\nb"}, "request_id"),
    ({"messages": HI, "request_id": "x" * 129}, "request_id"),
    ({"messages": HI, "return_prompt_text": True}, "return_prompt_text"),
    ({"messages": HI, "vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"messages": HI, "modalities": ["text", "audio"]}, "modalities"),
    ({"messages": HI, "best_of": 2}, "best_of"),
    (
        {"messages": HI, "continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
    ),
    ({"messages": HI, "chat_template": "x"}, "chat_template"),
    ({"messages": HI, "chat_template_kwargs": {"messages": None}}, "chat_template_kwargs"),
    ({"messages": HI, "chat_template_kwargs": {"x": "<|im_end|>"}}, "chat_template_kwargs"),
    ({"messages": HI, "chat_template_kwargs": {"eos_token": 1}}, "chat_template_kwargs"),
    ({"messages": HI, "chat_template_kwargs": {f"x{i}": i for i in range(65)}}, "chat_template_kwargs"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": ask(png())[0]["content"]}, *HI][::-1] * 40}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHAT)
async def test_bad_fields_are_named(cluster: Cluster, body: dict[str, Any], param: str) -> None:
    response = await cluster.http.post("/v1/chat/completions", json=body)
    assert response.status_code in (400, 413), response.text
    assert_error(response.json(), response.status_code, param=param)
    assert response.headers["x-should-retry"] == "false"
    assert cluster.pd.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"metadata": ' + b"[" * 100_000,
        b"model=x&messages=y",
    ],
)
async def test_malformed_json(cluster: Cluster, body: bytes) -> None:
    response = await cluster.http.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert_error(response.json(), 400, code="invalid_json")


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}']
)
async def test_json_of_another_shape(cluster: Cluster, body: bytes) -> None:
    response = await cluster.http.post("/v1/chat/completions", content=body, headers=JSON)
    assert_error(response.json(), 400, code="invalid_request")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/tokenize", "/v1/score", "/v1/generate"])
@pytest.mark.parametrize("parts", [b'"x",', b"[],", b"{},"])
async def test_bodies_of_very_many_parts_are_not_decoded(cluster: Cluster, path: str, parts: bytes) -> None:
    """Each part would be an object, and nothing else would happen while they are made."""
    content = b'{"prompt": "x", "stop": [' + parts * (1 << 20) + b"0]}"
    response = await cluster.http.post(path, content=content, headers=JSON)
    assert response.status_code == 413
    assert "parts" in response.json()["message"]


@pytest.mark.parametrize("text", ['"' * 1000, "{}[],:" * 1000, "a, b, c" * 300_000])
async def test_texts_may_have_what_json_is_made_of(cluster: Cluster, text: str) -> None:
    response = await cluster.http.post("/tokenize", json={"prompt": text[: 1 << 20], "unknown": text})
    assert response.status_code == 200, response.text


GOOD_CHAT: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}, *HI]},
    {"messages": [{"role": "assistant", "content": None}, *HI]},
    {"messages": [{"role": "user", "content": []}]},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [{"role": "system", "content": "only"}]},
    {"messages": [*HI, *HI, {"role": "assistant", "content": "so"}]},
    {"messages": [{"role": "user", "content": [{"text": "no type"}, {"image_url": data_url(png())}]}]},
    {"messages": HI, "user": "u", "metadata": {}, "store": True, "service_tier": "auto", "unknown": {"a": 1}},
    {"messages": HI, "tools": [], "tool_choice": "none", "logprobs": False, "response_format": {"type": "text"}},
    {"messages": HI, "presence_penalty": 0, "logit_bias": {}, "top_logprobs": 0, "modalities": ["text"]},
    {"messages": HI, "temperature": 0, "n": None, "stop": None, "max_tokens": None, "stream": None, "seed": -5},
    {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": HI, "chat_template_kwargs": {"self": 1, "value": 2, "a b": 3}},
    {"messages": HI, "stop": ["x"] * 16, "min_tokens": 1, "ignore_eos": True},
    {"messages": HI, "use_beam_search": False, "length_penalty": 1.0, "structured_outputs": {}, "best_of": 1},
    {"messages": HI, "logprobs": True, "top_logprobs": 20, "repetition_penalty": 1, "bad_words": []},
]


@pytest.mark.parametrize("body", GOOD_CHAT)
async def test_harmless_requests_pass(cluster: Cluster, body: dict[str, Any]) -> None:
    response = await cluster.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        ("data:image/png;base64,AAAA", 400, "invalid_image"),
        ("data:image/png;base64,", 400, "invalid_image"),
        (data_url(b"<html>"), 400, "invalid_image"),
        ("file:///etc/passwd", 403, "media_forbidden"),
        ("http://127.0.0.1:1/x.png", 403, "media_forbidden"),
        ("http://does-not-exist.invalid/x.png", 422, "media_unavailable"),
        (data_url(png(size=(2000, 2000))), 413, "request_too_large"),
        ("ftp://x", 400, "invalid_request"),
    ],
)
async def test_bad_pictures(start_cluster: ClusterFactory, image: str, status: int, code: str) -> None:
    cluster = await start_cluster(max_image_pixels=1_000_000)
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": image}}]
    body = {"messages": [{"role": "user", "content": parts}], "stream": True}
    response = await cluster.http.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    assert_error(response.json(), status, code=code, param="messages[0].content[1]")


async def test_text_model_refuses_pictures(start_cluster: ClusterFactory, tmp_path: Path) -> None:
    cluster = await start_cluster(model=write_model(tmp_path, images=False), encoders=0)
    response = await cluster.chat("x", png())
    assert_error(response.json(), 400, param="messages[0].content[1]")
    assert (await cluster.chat("x")).status_code == 200


async def test_model_names(cluster: Cluster) -> None:
    assert (await cluster.chat("x", model=cluster.name)).status_code == 200
    response = await cluster.chat("x", model="gpt-4")
    assert response.status_code == 404
    assert_error(response.json(), 404, code="model_not_found", param="model")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_context_overflow_says_the_known_phrase(start_cluster: ClusterFactory, path: str) -> None:
    cluster = await start_cluster(max_model_len=20)
    body = {"messages": ask("hello " * 100), "prompt": "hello " * 100}
    response = await cluster.http.post(path, json=body)
    assert_error(response.json(), 400, code="context_length_exceeded")
    assert response.json()["message"].startswith("This model's maximum context length is 20 tokens")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 5000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"text": ""}] * 5000}]}),
        ("/v1/completions", {"prompt": [1] * 5000}),
        ("/v1/completions", {"prompt": [[1] * 5000]}),
    ],
)
async def test_more_pieces_than_tokens_cost_no_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """A few megabytes of empty parts, looked at one by one, would stop all streams for seconds."""
    monkeypatch.setattr("proxy.api.answering.messages_of", lambda _: 1 / 0)
    monkeypatch.setattr("proxy.api.openai.prompt.check_token_ids", lambda ids, *_: ids and 1 / 0)
    response = await cluster.http.post(path, json=body)
    assert_error(response.json(), 400, code="context_length_exceeded")


async def test_body_limit(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_body_bytes=10_000)
    response = await cluster.chat("x" * 20_000)
    assert response.status_code == 413
    assert_error(response.json(), 413, code="request_too_large")

    async def chunks() -> Any:
        for _ in range(30):
            yield b" " * 1000

    response = await cluster.http.post("/v1/chat/completions", content=chunks(), headers=JSON)
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
        ("GET", "/v1/models/a%0Ab", 404),
        ("GET", "/v1/models/other", 404),
    ],
)
async def test_every_path_answers_in_one_shape(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, method: str, path: str, status: int
) -> None:
    caplog.set_level(logging.INFO, "proxy")
    response = await cluster.http.request(method, path)
    assert response.status_code == status
    assert_error(response.json(), status)
    assert "None" not in response.json()["message"]
    assert not any("\n" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("sent", "kept"), [("abc-1", True), ("x" * 129, False), ("a b", False), ("é", False), ("", False)]
)
async def test_request_ids_are_echoed_when_harmless(cluster: Cluster, sent: str, kept: bool) -> None:
    response = await cluster.http.get("/ping", headers=[(b"x-request-id", sent.encode())])
    echoed = response.headers["x-request-id"]
    assert (echoed == sent) is kept
    assert echoed


async def test_bugs_are_500_in_the_same_shape(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.service, "model", lambda name: 1 / 0)
    response = await cluster.chat("x")
    assert response.status_code == 500
    assert_error(response.json(), 500, code="internal_error")
    assert response.headers["x-request-id"] in response.json()["message"]
    assert "division" not in response.text


async def test_bugs_behind_the_long_way_are_too(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoints that FastAPI itself routes to."""
    monkeypatch.setattr(cluster.service, "named_models", lambda: 1 / 0)
    response = await cluster.http.get("/v1/models")
    assert response.status_code == 500
    assert_error(response.json(), 500, code="internal_error")
    assert response.headers["x-request-id"] in response.json()["message"]


async def test_doubled_slashes_of_base_urls(cluster: Cluster) -> None:
    response = await cluster.http.post("/v1//chat/completions", content=json.dumps({"messages": HI}), headers=JSON)
    assert response.status_code == 200


async def test_body_that_trickles_in(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(request_timeout=0.1)
    async with cluster.connection() as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
        writer.write(b"Content-Type: application/json\r\n\r\n{")
        answer = await reader.read()  # until the server closes
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert_error(json.loads(answer.partition(b"\r\n\r\n")[2]), 408, code="request_timeout")
