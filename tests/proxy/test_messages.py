"""`/v1/messages` in front of fake workers: what goes out, what comes back, whole and as events."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from epd.errors import InternalError, Overloaded
from epd.types import FinishReason
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster, ClusterFactory, data_url, png
from tests.proxy.fakes import Received
from tests.proxy.tools.conftest import PARIS, TOOLS, block

STREAM = pytest.mark.parametrize("stream", [False, True])
HI: dict[str, Any] = {"role": "user", "content": "hi"}
FLAT: list[Any] = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"].get("description", ""),
        "input_schema": tool["function"].get("parameters", {"type": "object"}),
    }
    for tool in TOOLS
]
CHAT_TOOLS = [
    {
        "type": "function",
        "function": {"name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"]},
    }
    for tool in FLAT
]
IMAGE: dict[str, Any] = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()},
}


async def post(cluster: Cluster, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    return await cluster.http.post(path, json={"messages": [HI], "max_tokens": 1000} | fields)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, whose names are their types."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found: list[Any] = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def rebuilt(found: list[Any]) -> Any:
    """The message of a stream, put together from its parts by the letter of the contract."""
    start, *middle, delta, stop = found
    assert (start["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = start["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert message["usage"]["output_tokens"] == 0
    assert message["usage"]["input_tokens"] > 0
    is_open = False
    for event in middle:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                is_open, text = True, ""
            case "content_block_delta":
                assert is_open
                assert event["index"] == len(message["content"]) - 1
                text += event["delta"].get("text", "") + event["delta"].get("partial_json", "")
            case "content_block_stop":
                assert is_open
                assert event["index"] == len(message["content"]) - 1
                last, is_open = message["content"][-1], False
                if last["type"] == "text":
                    assert last["text"] == ""
                    last["text"] = text
                else:
                    assert last["input"] == {}
                    last["input"] = json.loads(text or "{}")
            case _:
                raise AssertionError(event)
    assert not is_open
    return message | delta["delta"] | {"usage": delta["usage"]}


def message_of(response: httpx.Response) -> Any:
    """The message, whether it came whole or in events."""
    assert response.status_code == 200, response.text
    is_whole = response.headers["content-type"] == "application/json"
    return response.json() if is_whole else rebuilt(events(response))


# -- answers -----------------------------------------------------------------------------------------------------------


@STREAM
async def test_text(cluster: Cluster, stream: bool) -> None:
    response = await post(cluster, stream=stream, metadata={"user_id": "me"})
    found = message_of(response)
    assert found["id"].startswith("msg_")
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", cluster.name)
    assert found["content"] == [{"type": "text", "text": "hello world", "citations": None}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    [request] = cluster.pd.requests
    assert found["usage"] == {
        "input_tokens": len(request.prompt_token_ids) - 4,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "output_tokens": len(cluster.pd.answer),
    }


@STREAM
async def test_why_answers_end(cluster: Cluster, stream: bool) -> None:
    found = message_of(await post(cluster, stream=stream, max_tokens=1))
    assert (found["stop_reason"], found["usage"]["output_tokens"]) == ("max_tokens", 1)
    found = message_of(await post(cluster, stream=stream, stop_sequences=["never", " wor"]))
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", " wor")
    assert found["content"][0]["text"] == "hello"


async def test_an_answer_without_text_has_no_content(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(answer="")
    assert message_of(await post(cluster))["content"] == message_of(await post(cluster, stream=True))["content"] == []


async def test_a_limit_beyond_the_context_is_no_error(cluster: Cluster) -> None:
    """Clients must send one, and send what the models that they know can do."""
    message_of(await post(cluster, max_tokens=64_000))
    sampling = cluster.pd.requests[0].sampling
    assert (sampling.max_tokens, sampling.fits_context) == (64_000, True)


async def test_the_context_of_the_proxy_bounds_such_a_limit(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_model_len=20)
    assert message_of(await post(cluster, max_tokens=64_000))["stop_reason"] == "end_turn"
    [request] = cluster.pd.requests
    assert request.sampling.max_tokens == 20 - len(request.prompt_token_ids)
    cluster.pd.answer = cluster.pd.answer * 20
    assert message_of(await post(cluster, max_tokens=64_000))["stop_reason"] == "model_context_window_exceeded"


async def test_sampling_and_form(cluster: Cluster) -> None:
    form = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    message_of(await post(cluster, temperature=0.3, top_p=0.5, top_k=7, output_config=form))
    sampling = cluster.pd.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.3, 0.5, 7, 1000)
    assert sampling.grammar is not None
    assert json.loads(sampling.grammar.text) == {"type": "object"}


# -- what is asked -----------------------------------------------------------------------------------------------------


async def same_prompt(cluster: Cluster, ours: dict[str, Any], chat: dict[str, Any]) -> None:
    message_of(await post(cluster, **ours))
    await cluster.http.post("/v1/chat/completions", json=chat)
    first, second = cluster.pd.requests
    assert first.prompt_token_ids == second.prompt_token_ids
    assert [image.content_key for image in first.images] == [image.content_key for image in second.images]


async def test_a_conversation_is_that_of_the_chat(cluster: Cluster) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(png())}}
    cached = {"cache_control": {"type": "ephemeral"}}
    ours = {
        "system": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind", **cached}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a "}, IMAGE]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, text("red")]},
            {"role": "user", "content": "sure?"},
        ],
    }
    messages = [
        {"role": "system", "content": "be\nkind"},
        {"role": "user", "content": [text("a "), picture]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "sure?"},
    ]
    await same_prompt(cluster, ours, {"messages": messages})
    assert len(cluster.pd.requests[0].images) == 1


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


async def test_uses_of_tools_and_their_results_are_those_of_the_chat(cluster: Cluster) -> None:
    """A picture that a tool gave back is shown in the user's turn behind it."""
    uses = [
        {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}},
        {"type": "tool_use", "id": "toolu_2", "name": "get_time", "input": {}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("sunny"), IMAGE]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "noon", "is_error": False},
        text("well?"),
    ]
    ours = {
        "messages": [
            HI,
            {"role": "assistant", "content": [text("Let me look."), *uses]},
            {"role": "user", "content": results},
        ],
        "tools": FLAT,
    }
    calls = [
        {"id": "toolu_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
        {"id": "toolu_2", "type": "function", "function": {"name": "get_time", "arguments": "{}"}},
    ]
    messages = [
        HI,
        {"role": "assistant", "content": "Let me look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "noon"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(png())}}, text("well?")]},
    ]
    await same_prompt(cluster, ours, {"messages": messages, "tools": CHAT_TOOLS})
    assert len(cluster.pd.requests[0].images) == 1


async def test_the_answer_goes_on_with_the_last_word_of_the_assistant(cluster: Cluster) -> None:
    ours = [HI, {"role": "assistant", "content": [text("hello")]}]
    chat = {"messages": [HI, {"role": "assistant", "content": "hello"}], "continue_final_message": True}
    await same_prompt(cluster, {"messages": ours}, chat)


@pytest.mark.parametrize("kind", ["disabled", "enabled", "adaptive"])
async def test_thinking_is_a_switch_of_the_template(cluster: Cluster, kind: str) -> None:
    message_of(await post(cluster, thinking={"type": kind, "budget_tokens": 2000}))


# -- tools -------------------------------------------------------------------------------------------------------------


@STREAM
async def test_text_and_uses(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(f"Let me look.\n{block()}\n{block('get_time', '{}')}"))
    found = message_of(await post(cluster, tools=FLAT, stream=stream))
    said, *uses = found["content"]
    assert said["text"] == "Let me look."
    assert [(use["type"], use["name"], use["input"]) for use in uses] == [
        ("tool_use", "get_weather", json.loads(PARIS)),
        ("tool_use", "get_time", {}),
    ]
    assert len({use["id"] for use in uses}) == 2
    assert found["stop_reason"] == "tool_use"


@pytest.mark.parametrize("arguments", ['{"a": 1,}', "[1]", '{"a": ' + "[" * 1500 + "]" * 1500 + "}"])
async def test_input_that_is_no_object_is_shown_in_one(cluster: Cluster, tokenizer: Tokenizer, arguments: str) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(block(arguments=arguments)))
    [use] = message_of(await post(cluster, tools=FLAT, max_tokens=4000))["content"]
    assert use["input"] == {"arguments": arguments}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
async def test_a_choice_is_enforced(cluster: Cluster, tokenizer: Tokenizer, choice: dict[str, Any]) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(block() + block()))
    found = message_of(await post(cluster, tools=FLAT, tool_choice=choice | {"disable_parallel_tool_use": True}))
    assert cluster.pd.requests[0].sampling.grammar is not None
    assert (len(found["content"]), found["stop_reason"]) == (1, "tool_use")


@pytest.mark.parametrize(
    "fields", [{"tools": FLAT, "tool_choice": {"type": "none"}}, {"tools": [], "tool_choice": {"type": "auto"}}]
)
async def test_no_tools(cluster: Cluster, tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(block()))
    found = message_of(await post(cluster, **fields))
    assert ([one["text"] for one in found["content"]], found["stop_reason"]) == ([block()], "end_turn")


@STREAM
async def test_a_use_that_is_cut_off(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(block()))
    response = await post(cluster, tools=FLAT, stream=stream, max_tokens=len(cluster.pd.answer) // 2 + 5)
    if stream:
        assert events(response)[-2]["delta"]["stop_reason"] == "max_tokens"
    else:
        found = response.json()
        assert found["stop_reason"] == "max_tokens"
        assert found["content"][0]["text"].startswith("<tool_call>")


# -- counting ----------------------------------------------------------------------------------------------------------


async def test_counts_are_those_of_the_prompt(cluster: Cluster) -> None:
    body: dict[str, Any] = {"system": "be kind", "tools": FLAT, "messages": [HI]}
    message_of(await post(cluster, **body))
    response = await cluster.http.post("/v1/messages/count_tokens", json=body)
    assert response.json() == {"input_tokens": len(cluster.pd.requests[0].prompt_token_ids)}
    assert len(cluster.pd.requests) == 1
    response = await cluster.http.post(
        "/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": [IMAGE]}]}
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages[0].content[0]"), error


# -- errors ------------------------------------------------------------------------------------------------------------

USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"system": [IMAGE]}, "system"),
    ({"messages": [HI, {"role": "user", "content": [{"type": "document"}]}]}, "messages[1].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].source"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "x"}}]}]},
        "messages[0].content[0].source",
    ),
    (
        {
            "system": "moves all by one",
            "messages": [
                HI,
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "ftp://x/y"}}]},
            ],
        },
        "messages[1].content[0]",
    ),
    ({"messages": [HI, {"role": "assistant", "content": [IMAGE]}, HI]}, "messages[1]"),
    (
        {"messages": [HI, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "no"}]}]},
        "messages[1].content[0].tool_use_id",
    ),
    (
        {"messages": [HI, USE, {"role": "user", "content": [{"type": "tool_result"}]}]},
        "messages[2].content[0].tool_use_id",
    ),
    (
        {"messages": [HI, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
        "messages[1].content[0].id",
    ),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "f", "strict": True, "input_schema": {"type": "nothing"}}]}, "tools[0].input_schema"),
    ({"tools": FLAT, "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice.name"),
    ({"tools": FLAT, "tool_choice": {"type": "tool"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"thinking": {"type": "deep"}}, "thinking.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"container": "x"}, "container"),
]


async def test_what_cannot_be_served_is_named(cluster: Cluster) -> None:
    for fields, param in WRONG:
        response = await post(cluster, **fields)
        body = response.json()
        assert response.status_code == 400, (fields, body)
        assert body["type"] == "error"
        assert body["error"]["type"] == "invalid_request_error"
        assert body["error"]["param"] == param, body
        assert body["request_id"] == response.headers["x-request-id"]
    assert not cluster.pd.requests


async def test_statuses_have_their_types(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(api_key=("good",), max_body_bytes=1000)
    good = {"x-api-key": "good"}
    for status, kind, headers, body in [
        (401, "authentication_error", {}, {}),
        (404, "not_found_error", good, {"model": "gpt"}),
        (413, "request_too_large", good, {"system": "x" * 1000}),
        (400, "invalid_request_error", good, {"max_tokens": "x"}),
    ]:
        cluster.http.headers.pop("x-api-key", None)
        cluster.http.headers.update(headers)
        response = await post(cluster, **body)
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)

    async def script(received: Received) -> None:
        await received.send(finish=FinishReason.ERROR, error=Overloaded("The worker is full.").to_info())

    cluster.pd.script = script
    response = await post(cluster)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert response.headers["retry-after"]


async def test_an_answer_that_breaks_off(cluster: Cluster, tokenizer: Tokenizer) -> None:
    async def script(received: Received) -> None:
        if not received.request.resume_token_ids:
            await received.send(*tokenizer.encode("hello"))
        await received.send(finish=FinishReason.ERROR, error=InternalError("The engine failed.").to_info())

    cluster.pd.script = script
    *found, error = events(await post(cluster, stream=True))
    assert found[-1]["type"] == "content_block_delta"
    assert (error["type"], error["error"]["type"]) == ("error", "api_error")
    assert "engine failed" in error["error"]["message"]
