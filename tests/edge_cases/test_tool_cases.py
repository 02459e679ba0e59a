"""Edge cases that are about tool calls; tests/proxy/tools has the many small ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from epd.types import FinishReason
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster
from tests.proxy.fakes import Received
from tests.proxy.test_chat import events
from tests.proxy.tools.conftest import PARIS, TOOLS, block
from tests.proxy.tools.test_tool_answers import answered, calls_of, choice_of

STREAM = pytest.mark.parametrize("stream", [False, True])


@STREAM
async def test_e02_stop_strings_that_begin_like_markers_leave_them_whole(
    cluster: Cluster, tokenizer: Tokenizer, stream: bool
) -> None:
    """What is held back for a stop string reaches the parser, and there is no run of empty chunks meanwhile."""
    stops = ["<tool_response>", "</tool_calls>", "\n\n\n"]
    cluster.pd.answer = tuple(tokenizer.encode(f"Look: {block()}"))
    response = await cluster.chat("hi", tools=TOOLS, stop=stops, stream=stream)
    choice = choice_of(response)
    assert calls_of(choice) == [("get_weather", PARIS)]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Look:", "tool_calls")
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in events(response)]
        assert all(delta.get("content") or delta.get("tool_calls") for delta in deltas[1:-1])


@STREAM
@pytest.mark.parametrize(
    ("stop", "content", "calls"),
    [
        ("get_", 'Look: <tool_call>\n{"name": "', 0),  # before it is known to be a call
        ("</tool_call>", "Look:", 1),  # the call is whole
        ("ook", "L", 0),
    ],
)
async def test_e03_a_stop_string_while_the_parser_reads_loses_nothing(
    cluster: Cluster, tokenizer: Tokenizer, stop: str, content: str, calls: int, stream: bool
) -> None:
    choice = await answered(cluster, f"Look: {block()}", tokenizer, stop=stop, stream=stream)
    assert choice["message"]["content"] == content
    assert len(calls_of(choice)) == calls
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")


async def test_e19_role_and_id_come_once(cluster: Cluster, tokenizer: Tokenizer) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(f"{block()}\n{block()}"))
    chunks = events(await cluster.chat("hi", tools=TOOLS, stream=True, n=2))
    roles = [choice["index"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    assert sorted(roles) == [0, 1]
    deltas = [call for chunk in chunks for one in chunk["choices"] for call in one["delta"].get("tool_calls", ())]
    ids = [call["id"] for call in deltas if "id" in call]
    assert len(ids) == len(set(ids)) == 4
    assert all("index" in call for call in deltas)
    options: Any = {"model": cluster.name, "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    async with cluster.openai.chat.completions.stream(**options) as stream:
        built = (await stream.get_final_completion()).choices[0].message
    assert built.role == "assistant"
    assert all(len(call.id) == len(ids[0]) for call in built.tool_calls or ())


@STREAM
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{block()}\n{block('get_time', '{}')}", None, [("get_weather", PARIS), ("get_time", "{}")]),
        (block("unknown"), None, [("unknown", PARIS)]),
        (block(arguments="null"), None, [("get_weather", "{}")]),
        (block(arguments=json.dumps(PARIS)), None, [("get_weather", PARIS)]),
        (block().removesuffix("\n</tool_call>"), None, [("get_weather", PARIS)]),
        ("a <tool_cal", "a <tool_cal", []),
        ("<tool_call>\n{oops", "<tool_call>\n{oops", []),
    ],
    ids=["two", "unknown function", "null", "encoded twice", "unclosed", "partial opener", "no JSON"],
)
async def test_e20_whole_and_streamed_answers_agree(
    cluster: Cluster, tokenizer: Tokenizer, text: str, content: str | None, calls: Any, stream: bool
) -> None:
    choice = await answered(cluster, text, tokenizer, stream=stream)
    assert (choice["message"]["content"], calls_of(choice)) == (content, calls)
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")


@STREAM
async def test_e20_many_tokens_at_once_and_one_by_one_give_the_same(
    cluster: Cluster, tokenizer: Tokenizer, stream: bool
) -> None:
    async def all_at_once(received: Received) -> None:
        await received.send(*tokenizer.encode(f"Look:\n{block()}\n{block()}"), finish=FinishReason.STOP)

    cluster.pd.script = all_at_once
    choice = await answered(cluster, "", tokenizer, stream=stream)
    assert calls_of(choice) == [("get_weather", PARIS)] * 2
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Look:", "tool_calls")


async def test_e21_an_agent_goes_through_turns(cluster: Cluster, tokenizer: Tokenizer) -> None:
    """With openai-python: each answer goes back as it came, the results behind it."""
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    create: Any = cluster.openai.chat.completions.create
    for _ in range(2):
        cluster.pd.answer = tuple(tokenizer.encode(f"{block()}\n{block('get_time', 'null')}"))
        answer = await create(model=cluster.name, messages=messages, tools=TOOLS)
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_unset=True))
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in message.tool_calls]
    cluster.pd.answer = tuple(tokenizer.encode("hello world"))
    answer = await create(model=cluster.name, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "hello world"
    prompt = tokenizer.decode(cluster.pd.requests[-1].prompt_token_ids, skip_special_tokens=False)
    call = f'{{"name": "get_weather", "arguments": {PARIS}}}'
    assert prompt.count(call) == 2
    assert prompt.count("<tool_response>\nok\n</tool_response>\n<tool_response>\nok\n</tool_response>") == 2
    assert "None" not in prompt


async def test_e21_a_result_without_its_call_is_refused(cluster: Cluster) -> None:
    orphan = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    messages = [{"role": "user", "content": "hi"}, orphan]
    response = await cluster.http.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[1].tool_call_id"
