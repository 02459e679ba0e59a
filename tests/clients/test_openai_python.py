"""openai-python, synchronous and asynchronous, at the demo model. `/v1/responses` has tests of its own."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.clients.asking import ASK, ASK_PICTURE, CIRCLE, MODEL, SELF, WHO, Trip
from tests.cluster.harness import Cluster

RAW = f"<|im_start|>user\n{WHO}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def client(demo: Cluster) -> Iterator[openai.OpenAI]:
    with demo.client() as client:
        yield client


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    assert whole.choices[0].message.content == SELF
    assert whole.usage is not None
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=ASK, temperature=0, stream=True, extra_body={"stream_options": options}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == SELF
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_the_events_of_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASK, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "".join(event.delta for event in events if event.type == "content.delta") == SELF
    assert [event.content for event in events if event.type == "content.done"] == [SELF]
    assert final.choices[0].message.content == SELF
    assert final.choices[0].finish_reason == "stop"


def test_pictures(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK_PICTURE, temperature=0)
    assert answer.choices[0].message.content == CIRCLE


def test_parse_gives_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Trip, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Trip)
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, response_format=Trip, temperature=0, max_tokens=200
    ) as stream:
        streamed = stream.get_final_completion()
    assert isinstance(streamed.choices[0].message.parsed, Trip)


def test_parse_gives_the_arguments_of_a_tool(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=ASK,
        tools=[openai.pydantic_function_tool(Trip)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )
    assert answer.choices[0].message.tool_calls is not None
    [call] = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "Trip")
    assert isinstance(call.function.parsed_arguments, Trip)


def test_raw_answers_have_the_id_of_the_request(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=ASK, temperature=0, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.request_id == "mine-1"
    assert raw.parse().choices[0].message.content == SELF
    with client.completions.with_streaming_response.create(
        model=MODEL, prompt=RAW, temperature=0, max_tokens=40
    ) as response:
        assert response.request_id
        assert response.parse().choices[0].text == SELF


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=[RAW, RAW], temperature=0, max_tokens=40)
    assert [choice.text for choice in whole.choices] == [SELF, SELF]
    stream = client.completions.create(model=MODEL, prompt=RAW, temperature=0, max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == SELF


def test_embeddings_in_both_encodings(client: openai.OpenAI) -> None:
    """The client asks for base64 unless told otherwise."""
    packed = client.embeddings.create(model=MODEL, input=["a circle", "two squares"])
    plain = client.embeddings.create(model=MODEL, input=["a circle", "two squares"], encoding_format="float")
    assert [len(one.embedding) for one in packed.data] == [len(plain.data[0].embedding)] * 2
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-5)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_errors_are_of_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=-1)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 20_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model=MODEL, prompt=RAW, max_tokens=3000, timeout=0.1, extra_body={"ignore_eos": True}
        )
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Trip, max_tokens=2)


async def test_asynchronous(demo: Cluster) -> None:
    async with demo.async_client() as client:
        answer = await client.chat.completions.create(model=MODEL, messages=ASK_PICTURE, temperature=0)
        assert answer.choices[0].message.content == CIRCLE
        chunks = await client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == SELF
        async with client.chat.completions.stream(model=MODEL, messages=ASK, temperature=0) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == SELF
        parsed = await client.chat.completions.parse(
            model=MODEL, messages=ASK, response_format=Trip, max_tokens=200, temperature=0
        )
        assert isinstance(parsed.choices[0].message.parsed, Trip)
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_a_client_that_leaves_ends_its_request(demo: Cluster) -> None:
    async with demo.async_client() as client:
        stream = await client.completions.create(
            model=MODEL, prompt=RAW, max_tokens=3900, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
    demo.wait_for("/load", lambda body: body["server_load"] == 0)
