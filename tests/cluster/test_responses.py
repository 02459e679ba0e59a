"""`/v1/responses` by openai-python, before the demo model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from PIL import Image

from tests.cluster.harness import Cluster

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Answer(pydantic.BaseModel):
    """What an answer is parsed into."""

    capital: Literal["Paris", "Rome"]


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture(scope="module")
def client(demo: Cluster) -> Iterator[openai.OpenAI]:
    with demo.client() as client:
        yield client


def test_create(client: openai.OpenAI) -> None:
    response = client.responses.create(model="test-model", input=FRANCE, temperature=0, metadata={"a": "b"})
    assert (response.output_text, response.status) == (PARIS, "completed")
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 0


def test_a_conversation_goes_on_with_the_items_of_the_answer(client: openai.OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": FRANCE}]
    first = client.responses.create(model="test-model", input=items, temperature=0)
    items += [*first.output, {"role": "user", "content": FRANCE}]
    second = client.responses.create(model="test-model", input=items, instructions="Be brief.", temperature=0)
    assert second.output_text
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_picture_is_seen_as_in_a_chat(client: openai.OpenAI) -> None:
    content: Any = [{"type": "input_text", "text": "What is this?"}, {"type": "input_image", "image_url": picture()}]
    response = client.responses.create(
        model="test-model", input=[{"role": "user", "content": content}], temperature=0, max_output_tokens=20
    )
    parts: Any = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": picture()}}]
    chat = client.chat.completions.create(
        model="test-model", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=20
    )
    assert response.output_text == chat.choices[0].message.content != ""


def test_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="test-model", input=FRANCE, temperature=0) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert len(deltas) > 1
    assert "".join(deltas) == final.output_text == PARIS


def test_plain_stream_of_a_cut_answer(client: openai.OpenAI) -> None:
    events = client.responses.create(model="test-model", input=FRANCE, max_output_tokens=2, stream=True)
    *_, last = events
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_parse(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="test-model", input=FRANCE, text_format=Answer, temperature=0)
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.capital in ("Paris", "Rome")
    with client.responses.stream(model="test-model", input=FRANCE, text_format=Answer, temperature=0) as events:
        assert events.get_final_response().output_parsed == parsed.output_parsed


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: openai.OpenAI, stream: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "The weather in Rome?"}]
    asked: dict[str, Any] = {"model": "test-model", "tools": [WEATHER], "temperature": 0, "max_output_tokens": 200}
    choice: Any = {"type": "function", "name": "get_weather"}
    if stream:
        with client.responses.stream(input=items, tool_choice=choice, **asked) as events:
            response: Any = events.get_final_response()
    else:
        response = client.responses.create(input=items, tool_choice=choice, **asked)
    [call] = response.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    again = client.responses.create(input=items, **asked | {"max_output_tokens": 10})
    assert again.output_text


async def test_async(demo: Cluster) -> None:
    asked: dict[str, Any] = {"model": "test-model", "input": FRANCE, "temperature": 0}
    async with demo.async_client() as client, client.responses.stream(**asked) as events:
        assert (await events.get_final_response()).output_text == PARIS


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="test-model", input="hi", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt", input="hi")
    with pytest.raises(openai.BadRequestError, match="maximum context length is"):
        client.responses.create(model="test-model", input="word " * 20_000)
