"""Tokens of a stream are told on the spot; what has to wait, and what ends an answer, is the task's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from epd.types import FinishReason, SamplingParams
from proxy.api import teller
from proxy.api.dialect import Dialect, Head
from proxy.api.http import Client
from proxy.api.lightllm.token_native import TokenNativeDialect
from proxy.api.openai.answer import ChatDialect, Wanted
from proxy.dispatch.consumer import Teller
from proxy.dispatch.generation import Generation
from proxy.dispatch.work import Update, Work
from proxy.models.catalog import ModelRef
from proxy.text.answer import TextOptions
from proxy.text.token_text import TokenTexts
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster, ask
from tests.proxy.fakes import Received

Script = Callable[[Received, asyncio.Semaphore], Awaitable[None]]


async def stream(cluster: Cluster, script: Script, **fields: Any) -> AsyncGenerator[str]:
    """The lines of a stream whose worker goes one step further for each that the client has read."""
    steps = asyncio.Semaphore(1)

    async def run(received: Received) -> None:
        await script(received, steps)

    cluster.pd.script = run
    body = {"messages": ask("x"), "stream": True, **fields}
    async with asyncio.timeout(20), cluster.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line:
                yield line
            if '"content":"' in line and '"role"' not in line:
                steps.release()


def content_of(lines: list[str]) -> str:
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found if chunk.get("choices"))


def one_by_one(tokens: list[int]) -> Script:
    async def send(received: Received, steps: asyncio.Semaphore) -> None:
        for token in tokens:
            await steps.acquire()
            await received.send(token)
        await received.send(finish=FinishReason.STOP)

    return send


async def test_tokens_wake_no_task(cluster: Cluster, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer looks for the first tokens and for the end, however many come between."""
    looks, look = [], Generation.next

    async def count(self: Generation, *arguments: Any) -> Any:
        looks.append(1)
        return await look(self, *arguments)

    monkeypatch.setattr(Generation, "next", count)
    tokens = tokenizer.encode("hello world") * 5
    lines = [line async for line in stream(cluster, one_by_one(tokens))]
    assert content_of(lines) == "hello world" * 5
    assert len(tokens) > 5
    assert len(looks) <= 4


@pytest.mark.parametrize("fields", [{"logprobs": True}, {"n": 2}, {"return_token_ids": True}, {"stop": ["zzz"]}])
async def test_what_belongs_to_tokens_is_told_with_them(
    cluster: Cluster, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    tokens = tokenizer.encode("hello world")
    lines = [line async for line in stream(cluster, one_by_one(tokens), **fields)]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    for index in range(fields.get("n", 1)):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "hello world"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        if "logprobs" in fields:
            assert sum(len(choice["logprobs"]["content"]) for choice in mine if choice["logprobs"]) == len(tokens)
        if "return_token_ids" in fields:
            assert [token for choice in mine for token in choice.get("token_ids") or ()] == tokens
    assert lines[-1] == "data: [DONE]"


async def test_a_stop_string_told_on_the_spot_ends_the_answer(cluster: Cluster, tokenizer: Tokenizer) -> None:
    async def send(received: Received, steps: asyncio.Semaphore) -> None:
        await steps.acquire()
        await received.send(*tokenizer.encode("how "))
        await steps.acquire()
        await received.send(*tokenizer.encode("hello world"))

    lines = [line async for line in stream(cluster, send, stop=["o wor"])]
    assert content_of(lines) == "how hell"
    assert '"finish_reason":"stop"' in lines[-2]
    assert lines[-1] == "data: [DONE]"
    await cluster.pd.until(lambda: cluster.pd.aborted == [cluster.pd.requests[0].request_id])


class Scripted:
    """A generation of one sample. Each turn is what is told on the spot, and what the consumer finds when it looks."""

    num_samples, prompt_tokens, cached_tokens, done = 1, 3, 0, False

    def __init__(self, *turns: tuple[list[int], list[int]]) -> None:
        self.work = Work(
            request_id="r", model=ModelRef("f", "m"), prompts=((1, 2, 3),), sampling=SamplingParams(), arrived=0.0,
            timeout_s=60.0,
        )  # fmt: skip
        self._turns = list(turns)

    async def next(self, timeout_s: float | None = None, teller: Teller | None = None) -> list[Update]:
        told, found = self._turns.pop(0)
        if told:
            assert teller is not None
            assert not teller(Update(0, told))  # there is a stop string in it
        return [Update(0, found)] if found else []

    async def finish(self, index: int) -> None:
        self.done = True


async def told_of(generation: Any, dialect: Dialect, tokenizer: Tokenizer, options: TextOptions) -> str:
    pieces = []

    async def send(message: Any) -> None:
        pieces.append(message.get("body", b""))

    one = teller.Teller(generation, dialect, tokenizer, options, with_timings=False)
    await one.tell(Client({}, send), stream=True)
    return b"".join(pieces).decode()


async def test_what_comes_behind_a_stop_string_takes_nothing_away(tokenizer: Tokenizer) -> None:
    """The worker sends more before it hears of the stop; the event that ends the answer has its last text."""
    hello, more = tokenizer.encode("hello world"), tokenizer.encode("how")
    options = TextOptions(stop=("world",), with_pieces=True)
    dialect = TokenNativeDialect("a", 0.0, with_logprobs=False, is_cumulative=False)
    told = await told_of(Scripted(([], []), (hello, more)), dialect, tokenizer, options)
    [event] = [json.loads(line.removeprefix("data: ")) for line in told.splitlines() if line.startswith("data: {")]
    assert event["text"] == "hello "
    assert event["output_ids"] == hello[: len(event["output_ids"])] != []


async def test_a_stop_string_that_nothing_stands_before_is_no_silence(tokenizer: Tokenizer) -> None:
    first, stop = tokenizer.encode("hello "), tokenizer.encode("world")
    dialect = ChatDialect(Head("a", 0, "m"), Wanted(TokenTexts(tokenizer.backend)))
    told = await told_of(Scripted(([], first), (stop, [])), dialect, tokenizer, TextOptions(stop=("world",)))
    assert content_of(told.splitlines()) == "hello "
    assert ": ping" not in told


async def test_silence_after_tokens_told_on_the_spot_is_broken(
    cluster: Cluster, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teller, "PING_INTERVAL_S", 0.01)
    first, *others = tokenizer.encode("hello world")
    heard_ping = asyncio.Event()

    async def send(received: Received, steps: asyncio.Semaphore) -> None:
        await steps.acquire()
        await received.send(first)
        await steps.acquire()
        await received.send(others[0])
        await steps.acquire()
        heard_ping.clear()
        await heard_ping.wait()
        await received.send(*others[1:], finish=FinishReason.STOP)

    lines = []
    async for line in stream(cluster, send):
        lines.append(line)
        if line == ": ping":
            heard_ping.set()
    assert content_of(lines) == "hello world"


async def test_a_bug_in_telling_ends_the_answer(
    cluster: Cluster, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    word, told = ChatDialect.chunk, []

    def breaks(self: ChatDialect, *arguments: Any) -> bytes:
        told.append(1)
        if len(told) == 3:
            raise TypeError("a bug")
        return word(self, *arguments)

    monkeypatch.setattr(ChatDialect, "chunk", breaks)
    lines = [line async for line in stream(cluster, one_by_one(tokenizer.encode("hello world") * 4))]
    assert "internal_error" in lines[-2]
    assert lines[-1] == "data: [DONE]"
    await cluster.pd.until(lambda: bool(cluster.pd.aborted))


async def test_a_client_that_leaves_between_tokens_is_noticed(cluster: Cluster, tokenizer: Tokenizer) -> None:
    async def send(received: Received, steps: asyncio.Semaphore) -> None:
        while True:
            await steps.acquire()
            await received.send(tokenizer.encode("hello")[0])

    async with aclosing(stream(cluster, send)) as lines:
        for _ in range(5):
            await anext(lines)
    await cluster.pd.until(lambda: bool(cluster.pd.aborted))


async def test_a_client_that_lags_gets_all_in_order(cluster: Cluster, tokenizer: Tokenizer) -> None:
    """More than the sockets hold: the stream stops, and goes on with all that has come by then in one piece."""
    tokens = tokenizer.encode("hello world")
    total, sent = 20_000, asyncio.Event()

    async def flood(received: Received) -> None:
        for _ in range(total):
            await received.send(*tokens)
        await received.send(finish=FinishReason.STOP)
        sent.set()

    cluster.pd.script = flood
    body = json.dumps({"messages": ask("x"), "stream": True}).encode()
    async with cluster.connection() as (reader, writer):
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await sent.wait()
        received = b""
        while b"[DONE]" not in received[-100:]:
            received += await reader.read(2**16)
    lines = [line for line in received.decode().splitlines() if line.startswith("data: {")]
    assert content_of(lines) == "hello world" * total
    assert len(lines) < total * len(tokens) / 2
