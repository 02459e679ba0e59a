"""`/v1/responses` in front of fake workers: what goes out, what comes back, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from epd.errors import ContextLengthExceeded, InternalError
from epd.messages import GenerateRequest
from epd.types import FinishReason
from proxy.api.dialect import News
from proxy.text.tokenizer import Tokenizer
from proxy.tools.calls import CallDelta
from tests.proxy.conftest import Cluster, ClusterFactory, data_url, png
from tests.proxy.fakes import Received
from tests.proxy.tools.conftest import PARIS, TOOLS, block

STREAM = pytest.mark.parametrize("stream", [False, True])
FLAT: list[Any] = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]


async def post(cluster: Cluster, **fields: Any) -> httpx.Response:
    return await cluster.http.post("/v1/responses", json={"input": "hi"} | fields)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, with what holds for every one of them checked."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found: list[Any] = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        if frame.startswith(":"):
            continue
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == len(found)
        found.append(event)
    return found


def rebuilt(found: list[Any]) -> Any:
    """The response of a stream, put together from its parts by the letter of the contract."""
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    assert all(event["response"]["status"] == "in_progress" for event in found[:2])
    items: list[Any] = []
    for event in found[2:-1]:
        kind = event["type"].removeprefix("response.")
        index = event["output_index"]
        if kind == "output_item.added":
            assert index == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            continue
        assert index == len(items) - 1
        item = items[index]
        if kind == "output_item.done":
            assert event["item"] | {"status": "in_progress"} == item
            items[index] = event["item"]
            continue
        assert event["item_id"] == item["id"]
        match kind:
            case "content_part.added":
                assert item["content"] == []
                item["content"].append(event["part"])
            case "output_text.delta":
                item["content"][0]["text"] += event["delta"]
                item["content"][0]["logprobs"] += event["logprobs"]
            case "output_text.done":
                assert event["text"] == item["content"][0]["text"]
                assert event["logprobs"] == item["content"][0]["logprobs"]
            case "content_part.done":
                assert event["part"] == item["content"][0]
            case "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "function_call_arguments.done":
                assert event["arguments"] == item["arguments"]
            case _:
                raise AssertionError(event)
    response = found[-1]["response"]
    assert found[-1]["type"] == f"response.{response['status']}"
    assert response["output"] == items
    return response


def response_of(response: httpx.Response) -> Any:
    """The response, whether it came whole or in events."""
    assert response.status_code == 200, response.text
    is_whole = response.headers["content-type"] == "application/json"
    return response.json() if is_whole else rebuilt(events(response))


def text_of(response: Any) -> str:
    return "".join(item["content"][0]["text"] for item in response["output"] if item["type"] == "message")


def prompt_of(request: GenerateRequest, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)


# -- answers -----------------------------------------------------------------------------------------------------------


@STREAM
async def test_text(cluster: Cluster, stream: bool) -> None:
    given = {"metadata": {"a": "b"}, "user": "me", "temperature": 0.5, "instructions": "be kind", "store": True}
    found = response_of(await post(cluster, stream=stream, **given))
    assert found["id"].startswith("resp_")
    assert (found["object"], found["status"], found["error"]) == ("response", "completed", None)
    assert found["model"] == cluster.name
    assert found["store"] is False
    assert {name: found[name] for name in given} == given | {"store": False}
    [item] = found["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}]
    usage, [request] = found["usage"], cluster.pd.requests
    assert usage["input_tokens"] == len(request.prompt_token_ids)
    assert usage["output_tokens"] == len(cluster.pd.answer)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"]["cached_tokens"] == 4
    assert request.request_id.startswith(found["id"])


async def test_the_order_of_events(cluster: Cluster) -> None:
    names = [event["type"].removeprefix("response.") for event in events(await post(cluster, stream=True))]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]


@STREAM
async def test_the_limit(cluster: Cluster, stream: bool) -> None:
    found = response_of(await post(cluster, stream=stream, max_output_tokens=1))
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete"
    assert found["max_output_tokens"] == 1
    assert cluster.pd.requests[0].sampling.max_tokens == 1


@STREAM
async def test_an_answer_without_text_is_a_message(start_cluster: ClusterFactory, stream: bool) -> None:
    found = response_of(await post(await start_cluster(answer=""), stream=stream))
    assert [item["content"][0]["text"] for item in found["output"]] == [""]


@STREAM
@pytest.mark.parametrize("fields", [{"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}])
async def test_log_probabilities(cluster: Cluster, stream: bool, fields: dict[str, Any]) -> None:
    [item] = response_of(await post(cluster, stream=stream, **fields))["output"]
    logprobs = item["content"][0]["logprobs"]
    assert "".join(one["token"] for one in logprobs) == "hello world"
    assert {len(one["top_logprobs"]) for one in logprobs} == {fields.get("top_logprobs", 0)}


async def test_sampling_and_form(cluster: Cluster) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    asked = {"temperature": 0, "top_p": 0.5, "seed": 3, "top_k": 4, "stop": "x", "frequency_penalty": 1}
    found = response_of(await post(cluster, text={"format": form}, **asked))
    sampling = cluster.pd.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k) == (0, 0.5, 3, 4)
    assert sampling.frequency_penalty == 1
    assert sampling.grammar is not None
    assert json.loads(sampling.grammar.text) == {"type": "object"}
    assert found["text"] == {"format": form}


# -- what is asked -----------------------------------------------------------------------------------------------------


async def test_a_conversation_is_that_of_the_chat(cluster: Cluster) -> None:
    picture = data_url(png())
    items = [
        {"role": "developer", "content": "short"},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a "}, {"type": "input_image", "image_url": picture}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "red", "annotations": []}],
        },
        {"type": "message", "role": "user", "content": "sure?"},
    ]
    response_of(await post(cluster, instructions="be kind", input=items))
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "developer", "content": "short"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a "}, {"type": "image_url", "image_url": {"url": picture}}],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "sure?"},
    ]
    await cluster.http.post("/v1/chat/completions", json={"messages": messages})
    ours, chat = cluster.pd.requests
    assert ours.prompt_token_ids == chat.prompt_token_ids
    assert [image.content_key for image in ours.images] == [image.content_key for image in chat.images]
    assert len(ours.images) == 1


async def test_calls_and_their_outputs_are_those_of_the_chat(cluster: Cluster) -> None:
    items: list[Any] = [
        {"role": "user", "content": "the weather?"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "get_weather", "arguments": PARIS},
        {"type": "function_call", "id": "fc_2", "call_id": "call_2", "name": "get_time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "noon"}]},
    ]
    response_of(await post(cluster, input=items, tools=FLAT))
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}},
        {"id": "call_2", "type": "function", "function": {"name": "get_time", "arguments": "{}"}},
    ]
    messages = [
        {"role": "user", "content": "the weather?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
    ]
    await cluster.http.post("/v1/chat/completions", json={"messages": messages, "tools": TOOLS})
    ours, chat = cluster.pd.requests
    assert ours.prompt_token_ids == chat.prompt_token_ids


async def test_a_picture_that_a_function_gave_back_is_shown_behind_it(cluster: Cluster, tokenizer: Tokenizer) -> None:
    output = [{"type": "input_text", "text": "here"}, {"type": "input_image", "image_url": data_url(png())}]
    items = [
        {"role": "user", "content": "draw"},
        {"type": "function_call", "call_id": "call_1", "name": "draw", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": output},
    ]
    response_of(await post(cluster, input=items))
    [request] = cluster.pd.requests
    assert len(request.images) == 1
    behind = prompt_of(request, tokenizer).split("here")[1]
    assert "user\n<|vision_start|>" in behind


async def test_no_effort_leaves_thoughts_out(cluster: Cluster) -> None:
    for effort in ("none", "low"):
        assert response_of(await post(cluster, reasoning={"effort": effort}))["reasoning"]["effort"] == effort


# -- truncation --------------------------------------------------------------------------------------------------------


def conversation(first: int, last: int = 20) -> list[Any]:
    """Each turn: a question, a call, what it gave back, an answer."""
    items: list[Any] = [{"role": "developer", "content": "be kind"}]
    for i in range(first, last):
        items += [
            {"role": "user", "content": f"question {i}"},
            {"type": "function_call", "call_id": f"call_{i}", "name": "get_time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"call_{i}", "output": "noon"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
    return [*items, {"role": "user", "content": "last one"}]


async def test_the_oldest_turns_of_a_conversation_that_is_too_long_are_left_out(
    start_cluster: ClusterFactory, tokenizer: Tokenizer
) -> None:
    cluster = await start_cluster(max_model_len=300)
    asked: dict[str, Any] = {"input": conversation(0), "truncation": "auto", "max_output_tokens": 30}
    assert (await post(cluster, **asked | {"truncation": "disabled"})).status_code == 400
    found = response_of(await post(cluster, **asked))
    assert found["truncation"] == "auto"
    [request] = cluster.pd.requests
    prompt = prompt_of(request, tokenizer)
    kept = [i for i in range(20) if f"question {i}<" in prompt]
    assert kept == list(range(kept[0], 20))
    # It is the conversation of those turns, and with one turn more it would not fit.
    whole = asked | {"truncation": "disabled"}
    assert (await post(cluster, **whole | {"input": conversation(kept[0] - 1)})).status_code == 400
    assert (await post(cluster, **whole | {"input": conversation(kept[0])})).status_code == 200
    assert cluster.pd.requests[1].prompt_token_ids == request.prompt_token_ids


async def test_what_truncation_can_do_nothing_about(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_model_len=200)
    too_long = {"role": "user", "content": "word " * 500}
    response = await post(cluster, input=[*conversation(0), too_long], truncation="auto")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    picture = {
        "role": "user",
        "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "x:y"}],
    }
    response = await post(cluster, input=[*conversation(0), picture], truncation="auto")
    assert response.json()["error"]["param"] == f"input[{len(conversation(0))}].content[1]"


async def test_pictures_that_turn_out_too_long_cost_a_turn(cluster: Cluster) -> None:
    """Workers alone know what they expand to."""

    async def script(received: Received) -> None:
        if received.request.images:
            error = ContextLengthExceeded.of(limit=100, prompt=200, completion=None)
            await received.send(finish=FinishReason.ERROR, error=error.to_info())
        else:
            await received.worker.say_answer(received)

    cluster.pd.script = script
    picture = {"role": "user", "content": [{"type": "input_image", "image_url": data_url(png())}]}
    found = response_of(await post(cluster, input=[picture, *conversation(0, 2)], truncation="auto"))
    assert text_of(found) == "hello world"
    assert [len(request.images) for request in cluster.pd.requests] == [1, 0]


# -- tools -------------------------------------------------------------------------------------------------------------


@STREAM
async def test_text_and_calls(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(f"Let me look.\n{block()}\n{block('get_time', '{}')}"))
    found = response_of(await post(cluster, tools=FLAT, stream=stream))
    message, *calls = found["output"]
    assert message["content"][0]["text"] == "Let me look."
    assert [(call["name"], call["arguments"], call["status"]) for call in calls] == [
        ("get_weather", PARIS, "completed"),
        ("get_time", "{}", "completed"),
    ]
    assert len({call["call_id"] for call in calls} | {call["id"] for call in calls}) == 4
    assert found["status"] == "completed"
    assert found["tools"] == [{"parameters": None} | tool for tool in FLAT]


def test_text_behind_a_call_that_ends_with_it_stands_behind_the_rest_of_the_call() -> None:
    rest, call = CallDelta(0, arguments="}"), CallDelta(1, "call_1", "f")
    assert list(News("text", calls=[rest, call]).in_order()) == [rest, "text", call]
    assert list(News("text", calls=[call]).in_order()) == ["text", call]
    assert list(News(calls=[rest]).in_order()) == [rest]


async def test_text_behind_a_call_is_a_message_of_its_own(cluster: Cluster, tokenizer: Tokenizer) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(f"{block()} hello world"))
    found = response_of(await post(cluster, tools=FLAT, stream=True))
    assert [item["type"] for item in found["output"]] == ["function_call", "message"]
    assert found["output"][0]["arguments"] == PARIS
    assert text_of(found).strip() == "hello world"


async def test_a_call_that_is_cut_off_in_a_stream_is_incomplete(cluster: Cluster, tokenizer: Tokenizer) -> None:
    limit = len(tokenizer.encode(block())) // 2 + 5
    cluster.pd.answer = tuple(tokenizer.encode(block()))
    found = response_of(await post(cluster, tools=FLAT, stream=True, max_output_tokens=limit))
    [call] = found["output"]
    assert (found["status"], call["status"], call["name"]) == ("incomplete", "incomplete", "get_weather")
    assert PARIS.startswith(call["arguments"])


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
async def test_a_choice_is_enforced(cluster: Cluster, choice: Any) -> None:
    found = response_of(await post(cluster, tools=FLAT, tool_choice=choice, parallel_tool_calls=False))
    assert cluster.pd.requests[0].sampling.grammar is not None
    assert (found["tool_choice"], found["parallel_tool_calls"]) == (choice, False)


@pytest.mark.parametrize("fields", [{"tools": FLAT, "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}])
async def test_no_tools(cluster: Cluster, tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    response_of(await post(cluster, **fields))
    assert "get_weather" not in prompt_of(cluster.pd.requests[0], tokenizer)


# -- errors ------------------------------------------------------------------------------------------------------------

HI = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": [{"type": "reasoning"}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [HI, {"role": "user", "content": [{"type": "input_file"}]}]}, "input[1].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].image_url"),
    (
        {"input": [HI, {"role": "user", "content": [{"type": "input_image", "image_url": "ftp://x/y"}]}]},
        "input[1].content[0]",
    ),
    (
        {"input": [HI, {"role": "assistant", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
        "input[1].content[0]",
    ),
    ({"input": [HI, {"type": "function_call_output", "call_id": "no", "output": "x"}]}, "input[1].call_id"),
    ({"input": [HI, CALL, {"type": "function_call_output", "call_id": "call_1"}]}, "input[2].output"),
    ({"input": [HI, {"type": "function_call", "call_id": "call_1"}]}, "input[1].name"),
    ({"input": [HI, {"type": "function_call", "name": "f", "arguments": ""}]}, "input[1].call_id"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "some"}, "truncation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5000}, "input"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    (
        {"tools": [{"type": "function", "name": "f", "strict": True, "parameters": {"type": "nothing"}}]},
        "tools[0].parameters",
    ),
    ({"tools": FLAT, "tool_choice": {"type": "function", "name": "no"}}, "tool_choice.name"),
    ({"tools": FLAT, "tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
]


async def test_what_cannot_be_served_is_named(cluster: Cluster) -> None:
    for fields, param in WRONG:
        response = await post(cluster, **fields)
        assert response.status_code == 400, (fields, response.text)
        error = response.json()["error"]
        assert error["param"] == param, error
        assert "messages[" not in error["message"]
        assert "max_tokens" not in error["message"]
    assert not cluster.pd.requests


async def test_an_answer_that_breaks_off(cluster: Cluster, tokenizer: Tokenizer) -> None:
    async def script(received: Received) -> None:
        if not received.request.resume_token_ids:
            await received.send(*tokenizer.encode("hello"))
        await received.send(finish=FinishReason.ERROR, error=InternalError("The engine failed.").to_info())

    cluster.pd.script = script
    *found, error, failed = events(await post(cluster, stream=True))
    assert found[-1]["type"] == "response.output_text.delta"
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert error["message"] == error["error"]["message"] == failed["response"]["error"]["message"]
    assert "engine failed" in error["message"]
    assert failed["response"]["error"]["code"] == "server_error"
    assert failed["response"]["status"] == "failed"
    [item] = failed["response"]["output"]
    assert (item["status"], text_of(failed["response"])) == ("incomplete", "hello")
