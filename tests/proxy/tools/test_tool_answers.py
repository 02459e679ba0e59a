"""Tool calls as clients get them, whole and streamed, from workers that write what models write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from epd.types import FinishReason
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster, ClusterFactory
from tests.proxy.fakes import Received
from tests.proxy.model_files import write_model
from tests.proxy.test_chat import events
from tests.proxy.tools.conftest import PARIS, TOOLS, block

STREAM = pytest.mark.parametrize("stream", [False, True])


def choice_of(response: httpx.Response) -> Any:
    """The choice, as accumulators build it from a stream too."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("application/json"):
        return response.json()["choices"][0]
    message: dict[str, Any] = {"content": None}
    reasons = []
    for chunk in events(response):
        [choice] = chunk["choices"]
        delta = choice["delta"]
        if delta.get("content"):
            message["content"] = (message["content"] or "") + delta["content"]
        for call in delta.get("tool_calls", ()):
            add_call(message.setdefault("tool_calls", []), call)
        if "function_call" in delta:
            old = message.setdefault("function_call", {"name": None, "arguments": ""})
            old["name"] = old["name"] or delta["function_call"]["name"]
            old["arguments"] += delta["function_call"]["arguments"]
        reasons.append(choice["finish_reason"])
    assert all(reason is None for reason in reasons[:-1])
    return {"message": message, "finish_reason": reasons[-1]}


def add_call(calls: list[Any], delta: Any) -> None:
    """By the letter of the contract: id, type and name once, first; then null as the name, and no other key."""
    if delta["index"] == len(calls):
        assert set(delta) == {"index", "id", "type", "function"}
        assert delta["function"]["arguments"] == ""
        calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
        return
    assert set(delta) == {"index", "function"}
    assert delta["function"]["name"] is None
    calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]


async def answered(cluster: Cluster, text: str, tokenizer: Tokenizer, **fields: Any) -> Any:
    cluster.pd.answer = tuple(tokenizer.encode(text))
    return choice_of(await cluster.chat("hi", **({"tools": TOOLS} | fields)))


def calls_of(choice: Any) -> list[tuple[str, str]]:
    calls = choice["message"].get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["type"] == "function" for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@STREAM
async def test_a_call(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    choice = await answered(cluster, block(), tokenizer, stream=stream)
    assert calls_of(choice) == [("get_weather", PARIS)]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


@STREAM
async def test_text_and_two_calls(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    text = f"Let me look.\n{block()}\n{block('get_weather')}\n{block('unknown', 'null')}"
    choice = await answered(cluster, text, tokenizer, stream=stream)
    assert calls_of(choice) == [("get_weather", PARIS)] * 2 + [("unknown", "{}")]
    assert choice["message"]["content"] == "Let me look."
    assert choice["finish_reason"] == "tool_calls"


@STREAM
@pytest.mark.parametrize("text", ["just text <tool_cat> ", "a <tool_ca", "<tool_call>no"])
async def test_no_call(cluster: Cluster, tokenizer: Tokenizer, text: str, stream: bool) -> None:
    choice = await answered(cluster, text, tokenizer, stream=stream)
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]


@STREAM
@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}])
async def test_nothing_is_read_as_a_call_where_none_may_come(
    cluster: Cluster, tokenizer: Tokenizer, fields: dict[str, Any], stream: bool
) -> None:
    choice = await answered(cluster, block(), tokenizer, stream=stream, **fields)
    assert (choice["message"]["content"], choice["finish_reason"]) == (block(), "stop")
    assert "tool_calls" not in choice["message"]


@STREAM
async def test_cut_off_within_a_call(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    """Whole: the text is content. A stream has told part of the call by then. The reason is the same."""
    limit = len(tokenizer.encode(block())) // 2 + 5
    choice = await answered(cluster, block(), tokenizer, stream=stream, max_tokens=limit)
    assert choice["finish_reason"] == "length"
    if stream:
        [(name, arguments)] = calls_of(choice)
        assert name == "get_weather"
        assert PARIS.startswith(arguments)
    else:
        assert choice["message"]["content"] == tokenizer.decode(tokenizer.encode(block())[:limit]).rstrip("\ufffd")
        assert "tool_calls" not in choice["message"]


@STREAM
async def test_the_answer_ends_with_the_first_call_where_one_is_wanted(
    cluster: Cluster, tokenizer: Tokenizer, stream: bool
) -> None:
    async def go_on_forever(received: Received) -> None:
        for _ in range(3):
            for token in tokenizer.encode(block() + "\n"):
                await received.send(token)

    cluster.pd.script = go_on_forever
    choice = await answered(cluster, "", tokenizer, stream=stream, parallel_tool_calls=False)
    assert calls_of(choice) == [("get_weather", PARIS)]
    assert choice["finish_reason"] == "tool_calls"
    await cluster.pd.until(lambda: cluster.pd.aborted == [cluster.pd.requests[0].request_id])


@STREAM
@pytest.mark.parametrize(
    ("tool_choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "get_weather"}}, "stop")],
)
async def test_reason_of_enforced_calls(
    cluster: Cluster, tokenizer: Tokenizer, tool_choice: Any, reason: str, stream: bool
) -> None:
    choice = await answered(cluster, block(), tokenizer, stream=stream, tool_choice=tool_choice)
    assert calls_of(choice) == [("get_weather", PARIS)]
    assert choice["finish_reason"] == reason


@STREAM
async def test_deprecated_functions(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    functions = [tool["function"] for tool in TOOLS]
    choice = await answered(cluster, block() + block(), tokenizer, stream=stream, tools=None, functions=functions)
    assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": PARIS}
    assert choice["finish_reason"] == "function_call"
    assert "tool_calls" not in choice["message"]


async def test_samples_have_calls_of_their_own(cluster: Cluster, tokenizer: Tokenizer) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(block()))
    response = await cluster.chat("hi", tools=TOOLS, n=2, stream=True)
    opened = [
        (choice["index"], call["index"], call["id"])
        for chunk in events(response)
        for choice in chunk["choices"]
        for call in choice["delta"].get("tool_calls", ())
        if "id" in call
    ]
    assert sorted((sample, index) for sample, index, _ in opened) == [(0, 0), (1, 0)]
    assert len({call_id for *_, call_id in opened}) == 2


async def test_log_probabilities_are_of_all_tokens(cluster: Cluster, tokenizer: Tokenizer) -> None:
    text = f"Look: {block()}"
    tokens = len(tokenizer.encode(text))
    whole = await answered(cluster, text, tokenizer, logprobs=True)
    assert len(whole["logprobs"]["content"]) == tokens
    response = await cluster.chat("hi", tools=TOOLS, stream=True, logprobs=True)
    told = [chunk["choices"][0]["logprobs"] for chunk in events(response)]
    assert sum(len(one["content"]) for one in told if one) == tokens


@STREAM
async def test_a_stop_string_within_a_call_loses_no_text(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    choice = await answered(cluster, f"Look: {block()}", tokenizer, stream=stream, stop=['"name"'])
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Look: <tool_call>\n{", "stop")


async def test_an_error_within_a_call_ends_the_stream_with_it(cluster: Cluster, tokenizer: Tokenizer) -> None:
    async def fail(received: Received) -> None:
        for token in tokenizer.encode(block())[:-8]:
            await received.send(token)
        await received.send(finish=FinishReason.ERROR)

    cluster.pd.script = fail
    response = await cluster.chat("hi", tools=TOOLS, stream=True)
    assert events(response)[-1]["error"]["message"]


LLAMA = """{%- if tools %}{{ '<|python_tag|>' if false }}{{ tools | tojson(indent=4) }}{% endif %}
{%- for message in messages %}
{%- if message.tool_calls and message.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}{% endfor %}"""
MISTRAL = """{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- for call in message.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}[TOOL_CALLS][{{ call.function | tojson }}]
{%- endfor %}
{%- if message.role == 'tool' and message.tool_call_id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}
{{- '[INST]' + message.content + '[/INST]' }}{% endfor %}"""


@STREAM
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (LLAMA, f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "get_time", "parameters": {{}}}}'),
        (MISTRAL, f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "get_time"}}]'),
    ],
    ids=["llama3", "mistral"],
)
async def test_the_family_shows_in_the_template(
    start_cluster: ClusterFactory, tokenizer: Tokenizer, tmp_path: Path, template: str, text: str, stream: bool
) -> None:
    cluster = await start_cluster(model=write_model(tmp_path, template=template, images=False), encoders=0)
    choice = await answered(cluster, text, tokenizer, stream=stream)
    assert calls_of(choice) == [("get_weather", PARIS), ("get_time", "{}")]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("flag", ["auto", "hermes"])
async def test_a_template_that_says_nothing_needs_the_flag(
    start_cluster: ClusterFactory, tokenizer: Tokenizer, tmp_path: Path, flag: str
) -> None:
    model = write_model(tmp_path, template="{{ tools | tojson }}{{ messages[0].content[0].text }}", images=False)
    cluster = await start_cluster(model=model, encoders=0, tool_call_parser=flag)
    if flag == "auto":
        response = await cluster.chat("hi", tools=TOOLS)
        assert response.status_code == 400
        assert "--tool-call-parser" in response.json()["message"]
    else:
        assert calls_of(await answered(cluster, block(), tokenizer)) == [("get_weather", PARIS)]


# -- what clients make of it -------------------------------------------------------------------------------------------


async def test_openai_python_builds_the_calls(cluster: Cluster, tokenizer: Tokenizer) -> None:
    cluster.pd.answer = tuple(tokenizer.encode(f"Look:\n{block()}\n{block('get_time', '{}')}"))
    options: Any = {"model": cluster.name, "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    whole = await cluster.openai.chat.completions.create(**options)
    async with cluster.openai.chat.completions.stream(**options) as stream:
        kinds = [event.type async for event in stream]
        built = await stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    for completion in (whole, built):
        message = completion.choices[0].message
        assert message.role == "assistant"
        assert message.content == "Look:"
        assert completion.choices[0].finish_reason == "tool_calls"
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        assert calls == [("get_weather", PARIS), ("get_time", "{}")]
    again = [*options["messages"], built.choices[0].message.model_dump(exclude_none=True)]
    again += [
        {"role": "tool", "tool_call_id": call.id, "content": "fine"}
        for call in built.choices[0].message.tool_calls or ()
    ]
    cluster.pd.answer = tuple(tokenizer.encode("hello"))
    last = await cluster.openai.chat.completions.create(**(options | {"messages": again}))
    assert last.choices[0].message.content == "hello"


@pytest.mark.parametrize("is_strict", [True, False])
async def test_names_in_chunks_that_go_on_with_a_call(cluster: Cluster, tokenizer: Tokenizer, is_strict: bool) -> None:
    """Null for those who read them blindly; absent for openai-node, which compares them where a function is strict."""
    cluster.pd.answer = tuple(tokenizer.encode(block()))
    [tool, *others] = TOOLS
    tools = [tool | {"function": tool["function"] | {"strict": is_strict}}, *others]
    response = await cluster.chat("hi", tools=tools, stream=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in events(response)]
    first, *rest = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
    assert first["name"] == "get_weather"
    assert len(rest) > 1
    assert all(
        function == {"arguments": function["arguments"]} | ({} if is_strict else {"name": None}) for function in rest
    )


async def test_the_reading_loop_of_document_002(cluster: Cluster, tokenizer: Tokenizer) -> None:
    """As printed there: it reads the name in each delta, and only errors of JSON are forgiven."""
    cluster.pd.answer = tuple(tokenizer.encode(f"Look: {block()}"))
    data: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "tool_choice": "auto"}
    data |= {"model": cluster.name, "stream": True, "temperature": 0.7, "max_tokens": 1000}
    response = await cluster.http.post("/v1/chat/completions", json=data)
    content_buffer, tool_calls_buffer, names, arguments = "", [], [], []
    for raw in response.text.encode().splitlines():
        if raw:
            line = raw.decode("utf-8")
            if line.startswith("data: "):
                data_str = line[6:]
                if data_str == "[DONE]":
                    break
                chunk = json.loads(data_str)
                delta = chunk["choices"][0]["delta"]
                if delta.get("content"):
                    content_buffer += delta["content"]
                if delta.get("tool_calls"):
                    for tool_call in delta["tool_calls"]:
                        tool_calls_buffer.append(tool_call)
                        names.append(tool_call["function"]["name"])
                        if tool_call["function"].get("arguments"):
                            arguments.append(tool_call["function"]["arguments"])
    assert content_buffer == "Look:"
    assert names[0] == "get_weather"
    assert "".join(arguments) == PARIS
