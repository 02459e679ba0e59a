"""LangChain's client for servers that speak as OpenAI do, at the demo model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from tests.clients.asking import ASK_PICTURE, CIRCLE, MODEL, SELF, WHO, Trip
from tests.cluster.harness import Cluster


@tool
def look_up(city: str) -> str:
    """Look up the weather in a city."""
    return f"It rains in {city}."


@pytest.fixture(scope="module")
def chat(demo: Cluster) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=demo.base_url, api_key=SecretStr("none"), temperature=0, max_retries=0, timeout=60
    )


def test_invoke_stream_and_batch(chat: ChatOpenAI) -> None:
    answer = chat.invoke(WHO)
    assert answer.content == SELF
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    merged: Any = None
    for chunk in chat.stream(WHO, stream_usage=True):
        merged = chunk if merged is None else merged + chunk
    assert merged.content == SELF
    assert merged.usage_metadata["total_tokens"] == answer.usage_metadata["total_tokens"]
    assert [one.content for one in chat.batch([WHO, "What is 2 plus 3?"])] == [SELF, "5"]


async def test_asynchronous(chat: ChatOpenAI) -> None:
    assert (await chat.ainvoke(WHO)).content == SELF
    assert "".join([str(chunk.content) async for chunk in chat.astream(WHO)]) == SELF


def test_pictures(chat: ChatOpenAI) -> None:
    assert chat.invoke([HumanMessage(content=ASK_PICTURE[0]["content"])]).content == CIRCLE


@pytest.mark.parametrize("choice", ["any", "Trip"])
def test_tools_that_must_be_called(chat: ChatOpenAI, choice: str) -> None:
    bound = chat.bind_tools([Trip, look_up], tool_choice=choice, parallel_tool_calls=False)
    answer = bound.invoke("Plan a trip.", max_tokens=300)
    assert isinstance(answer, AIMessage)
    [call] = answer.tool_calls
    assert not answer.invalid_tool_calls
    assert call["name"] in ("Trip", "look_up") if choice == "any" else call["name"] == "Trip"
    merged: Any = None
    for chunk in bound.stream("Plan a trip.", max_tokens=300):
        merged = chunk if merged is None else merged + chunk
    assert [(one["name"], one["args"]) for one in merged.tool_calls] == [(call["name"], call["args"])]


def test_tools_that_the_model_may_call_and_their_results(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([look_up], tool_choice="auto")
    assert isinstance(bound.invoke(WHO), AIMessage)
    calls: list[Any] = [{"name": "look_up", "args": {"city": "Rome"}, "id": "call_1", "type": "tool_call"}]
    history = [
        HumanMessage(content="What is the weather in Rome?"),
        AIMessage(content="", tool_calls=calls),
        ToolMessage(content=look_up.invoke({"city": "Rome"}), tool_call_id="call_1"),
    ]
    assert bound.invoke(history, max_tokens=40).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Any) -> None:
    answer = chat.with_structured_output(Trip, method=method).invoke("Plan a trip.", max_tokens=300)
    assert isinstance(answer, Trip)


def test_json_mode(chat: ChatOpenAI) -> None:
    """Any object: which one, this model can't be told."""
    structured = chat.with_structured_output(None, method="json_mode", include_raw=True)
    answer: Any = structured.invoke("Answer in JSON.", max_tokens=60, stop=["}"], include_stop_str_in_output=True)
    assert answer["raw"].content.lstrip().startswith("{")


def test_responses(demo: Cluster) -> None:
    """The same by `/v1/responses`."""
    chat = ChatOpenAI(
        model=MODEL, base_url=demo.base_url, api_key=SecretStr("none"), temperature=0, use_responses_api=True
    )
    answer = chat.invoke(WHO)
    assert answer.text == "".join(chunk.text for chunk in chat.stream(WHO)) == SELF
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    assert chat.invoke([HumanMessage(content=ASK_PICTURE[0]["content"])]).text == CIRCLE
    called = chat.bind_tools([Trip], tool_choice="required", parallel_tool_calls=False).invoke("Plan a trip.")
    assert isinstance(called, AIMessage)
    [call] = called.tool_calls
    Trip.model_validate(call["args"])
    result = ToolMessage(content="done", tool_call_id=call["id"])
    assert chat.bind_tools([Trip]).invoke([HumanMessage(content="Plan a trip."), called, result], max_tokens=20)
    assert isinstance(chat.with_structured_output(Trip).invoke("Plan a trip."), Trip)


def test_completions_and_embeddings(demo: Cluster) -> None:
    key = SecretStr("none")
    text = OpenAI(model=MODEL, base_url=demo.base_url, api_key=key, temperature=0, max_tokens=40, max_retries=0)
    raw = f"<|im_start|>user\n{WHO}<|im_end|>\n<|im_start|>assistant\n"
    assert text.invoke(raw) == "".join(text.stream(raw)) == SELF
    # Its own splitting of long texts would need the tokenizer of OpenAI's models.
    vectors = OpenAIEmbeddings(model=MODEL, base_url=demo.base_url, api_key=key, check_embedding_ctx_length=False)
    one, other = vectors.embed_documents(["a circle", "two squares"])
    assert len(one) == len(other) > 10
    assert vectors.embed_query("a circle") == pytest.approx(one, abs=1e-5)
