"""Tool calls that are enforced, by a model that has never heard of tools: what it writes is what the parser reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.harness import Cluster

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]


def call(cluster: Cluster, *, stream: bool = False, temperature: float = 0, **fields: Any) -> Any:
    """The choice of an answer, as openai-python builds it."""
    options: Any = {"model": "test-model", "messages": ASK, "tools": [WEATHER, STOP], "max_tokens": 400}
    options |= {"temperature": temperature} | fields
    with cluster.client() as client:
        if not stream:
            return client.chat.completions.create(**options).choices[0]
        with client.chat.completions.stream(**options) as events:
            return events.get_final_completion().choices[0]


def check(one: Any) -> None:
    assert one.type == "function"
    assert one.id.startswith("call_")
    arguments = json.loads(one.function.arguments)
    if one.function.name == "stop":
        assert arguments == {}
    else:
        assert one.function.name == "get_weather"
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Paris", "Rome")
        assert 1 <= arguments["days"] <= 9


@pytest.mark.parametrize("stream", [False, True])
def test_named(demo: Cluster, stream: bool) -> None:
    choice = call(demo, stream=stream, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    [one] = choice.message.tool_calls
    check(one)
    assert one.function.name == "get_weather"
    assert choice.finish_reason == "stop"
    assert not choice.message.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_parallel", [False, True])
def test_required(demo: Cluster, stream: bool, is_parallel: bool) -> None:
    choice = call(demo, stream=stream, temperature=1, seed=1, tool_choice="required", parallel_tool_calls=is_parallel)
    assert not choice.message.content
    # It may go on calling up to the limit, but what it has written by then are calls.
    assert choice.finish_reason == "tool_calls" or is_parallel
    assert len(choice.message.tool_calls) == 1 or is_parallel
    for one in choice.message.tool_calls[:3]:
        check(one)


def test_an_answer_that_may_be_a_call_follows_the_wanted_form(demo: Cluster) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "required": ["a"]}}}
    tools = [tool | {"function": tool["function"] | {"strict": True}} for tool in (WEATHER, STOP)]
    choice = call(demo, response_format=form, tools=tools, temperature=1, seed=2)
    if choice.message.tool_calls:
        check(choice.message.tool_calls[0])
    elif choice.finish_reason == "stop":
        assert "a" in json.loads(choice.message.content)


def test_cut_off(demo: Cluster) -> None:
    choice = call(demo, tool_choice="required", max_tokens=12)
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("<tool_call>")
    assert not choice.message.tool_calls


def test_auto_leaves_the_model_its_words(demo: Cluster) -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    for tools in ([WEATHER], [strict]):
        choice = call(demo, tools=tools, max_tokens=20)
        assert choice.message.content
        assert not choice.message.tool_calls


def test_a_turn_of_calls_and_results_goes_on(demo: Cluster) -> None:
    first = call(demo, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    [one] = first.message.tool_calls
    result = {"role": "tool", "tool_call_id": one.id, "content": "sunny"}
    again = call(demo, messages=[*ASK, first.message.model_dump(exclude_none=True), result], max_tokens=10)
    assert again.finish_reason in ("stop", "length")
    assert again.message.content
