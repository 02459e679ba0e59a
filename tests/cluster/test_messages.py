"""`/v1/messages` by Anthropic's own Python client, before the demo model."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from PIL import Image

from tests.cluster.harness import Cluster

FRANCE_TEXT = "What is the capital of France?"
FRANCE: Any = [{"role": "user", "content": FRANCE_TEXT}]
PARIS = "The capital of France is Paris."
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(demo: Cluster) -> Iterator[anthropic.Anthropic]:
    url = demo.base_url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def asked(**fields: Any) -> dict[str, Any]:
    """A request; the limit is more than the context has room for."""
    # The client has no argument for the temperature, though the API has.
    greedy = {"temperature": 0}
    return {"model": "test-model", "max_tokens": 8192, "extra_body": greedy, "messages": FRANCE} | fields


def test_create(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**asked())
    [block] = message.content
    assert (block.type, block.text) == ("text", PARIS)
    assert (message.stop_reason, message.role) == ("end_turn", "assistant")
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 0
    assert message.usage.output_tokens > 0
    assert message._request_id


def test_counting(client: anthropic.Anthropic) -> None:
    usage = client.messages.create(**asked(system="Be brief.", max_tokens=1)).usage
    count = client.messages.count_tokens(model="test-model", messages=FRANCE, system="Be brief.")
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_picture_and_what_it_counts(client: anthropic.Anthropic, demo: Cluster) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    messages: Any = [{"role": "user", "content": content}]
    answer = client.messages.create(**asked(messages=messages, max_tokens=20))
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, content[1]]
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 20}
    _, chat = demo.post("/v1/chat/completions", body)
    assert answer.content[0].type == "text"
    assert answer.content[0].text == chat["choices"][0]["message"]["content"] != ""
    count = client.messages.count_tokens(model="test-model", messages=messages)
    assert count.input_tokens == chat["usage"]["prompt_tokens"]


def test_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**asked()) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(texts) > 1
    assert final.content[0].type == "text"
    assert "".join(texts) == final.content[0].text == PARIS
    assert final.usage.output_tokens > 0
    assert final.stop_reason == "end_turn"


def test_stop_sequence_and_a_beginning(client: anthropic.Anthropic) -> None:
    begun: Any = [*FRANCE, {"role": "assistant", "content": "The capital of"}]
    message = client.messages.create(**asked(messages=begun, stop_sequences=["Paris"]))
    assert message.content[0].type == "text"
    assert message.content[0].text == " France is "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Paris")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}]
)
def test_tools(client: anthropic.Anthropic, choice: dict[str, Any], stream: bool) -> None:
    fields = asked(tools=[WEATHER], tool_choice=choice, max_tokens=200)
    if stream:
        with client.messages.stream(**fields) as events:
            message: Any = events.get_final_message()
    else:
        message = client.messages.create(**fields)
    [use] = message.content
    assert (use.type, use.name, message.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert use.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    behind: Any = [message.to_param(), {"role": "user", "content": [result, {"type": "text", "text": FRANCE_TEXT}]}]
    assert client.messages.create(**asked(tools=[WEATHER], messages=[*FRANCE, *behind], max_tokens=10)).content


async def test_async(demo: Cluster) -> None:
    url = demo.base_url.removesuffix("/v1")
    async with (
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client,
        client.messages.stream(**asked()) as stream,
    ):
        assert await stream.get_final_text() == PARIS


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="gpt") as missing:
        client.messages.create(**asked(model="gpt"))
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: .* maximum context length is"):
        client.messages.create(**asked(messages=[{"role": "user", "content": "word " * 20_000}]))
