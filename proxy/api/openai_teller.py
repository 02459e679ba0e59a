"""Reads a generation and tells the client about it, in the words of a dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from msgspec import UNSET, UnsetType

from epd.errors import EPDError
from proxy.answer import Answer, TextOptions
from proxy.api.http import Client, error_body
from proxy.api.openai_answer import Dialect, News, Timings
from proxy.api.openai_responses import PromptTokensDetails, Usage
from proxy.generation import Generation
from proxy.tokenizer import Tokenizer
from proxy.work import Update

T = TypeVar("T")

FIRST_OUTPUT_GRACE_S = 5.0
"""Status and headers wait so long for the first output, so that what fails early gets a real status."""
PING_INTERVAL_S = 15.0
SETTLE_S = 0.25
"""An answer with timings waits so long for encoders that have not reported yet."""
_MANY_LOGPROBS = 1000
"""Positions from which an answer is put together off the event loop: each may name 20 tokens."""


@dataclass
class _Told:
    """How much of a sample the stream has told."""

    token_ids: int = 0
    logprobs: int = 0


class Teller:
    """Reads a generation and tells the client about it.

    Args:
        generation: in work; the caller closes it.
        dialect: words of the endpoint.
        tokenizer: of the model.
        options: how text is made.
        with_timings: whether the client asked where the time went.
    """

    def __init__(
        self,
        generation: Generation,
        dialect: Dialect,
        tokenizer: Tokenizer,
        options: TextOptions,
        *,
        with_timings: bool,
    ) -> None:
        self._generation = generation
        self._dialect = dialect
        work = generation.work
        self._answers = [Answer(tokenizer, options, prompt) for prompt in work.prompts for _ in range(work.n)]
        self._with_timings = with_timings
        self._told = [_Told() for _ in range(generation.num_samples)]

    async def tell_whole(self, client: Client) -> None:
        """Wait for the end, answer once.

        Raises:
            EPDError: the request failed; nothing was sent.
        """
        while not self._generation.done:
            for update in await self._generation.next():
                await self._advance(update)
        usage, timings = self._usage(), await self._timings()
        size = sum(len(one.logprobs) + len(one.prompt_logprobs) for one in self._answers)
        await client.reply(await _off_loop_if_many(size, lambda: self._dialect.whole(self._answers, usage, timings)))

    async def tell_stream(self, client: Client, *, include_usage: bool) -> None:
        """Answer in chunks. A failure after the first of them becomes an error event.

        Raises:
            EPDError: the request failed before anything was sent.
        """
        updates = await self._generation.next(FIRST_OUTPUT_GRACE_S)
        await client.start_stream()
        try:
            await self._stream_samples(client, updates)
            if include_usage:
                await client.event(self._dialect.usage(self._usage()))
        except EPDError as error:
            await client.event({"error": error_body(error)["error"]})
        await client.end_stream()

    async def _stream_samples(self, client: Client, updates: list[Update]) -> None:
        for index in range(len(self._answers)):
            opening = self._dialect.opening(index)
            if opening is not None:
                await client.event(opening)
        while True:
            for update in updates:
                await self._stream_update(client, update)
            if self._generation.done:
                return
            updates = await self._generation.next(PING_INTERVAL_S)
            if not updates and not self._generation.done:
                await client.ping()

    async def _stream_update(self, client: Client, update: Update) -> None:
        index = update.index
        text, answer = await self._advance(update), self._answers[update.index]
        if update.prompt_logprobs:
            size = len(update.prompt_logprobs)
            prompt = await _off_loop_if_many(size, lambda: self._dialect.prompt(index, answer))
            if prompt is not None:
                await client.event(prompt)
        if text:
            await client.event(self._dialect.chunk(index, self._news(index, text)))
        if answer.finish_reason is not None:
            closing = self._dialect.closing(
                index, answer.finish_reason.value, self._news(index, ""), await self._timings()
            )
            await client.event(closing)

    async def _advance(self, update: Update) -> str:
        answer = self._answers[update.index]
        text = answer.push(update)
        if answer.finish_reason is not None:
            await self._generation.finish(update.index)
        return text

    def _news(self, index: int, text: str) -> News:
        """The text with all that no chunk has told yet: what was held back comes with the text that it belongs to."""
        answer, told = self._answers[index], self._told[index]
        token_ids = UNSET if answer.token_ids is UNSET else answer.token_ids[told.token_ids :]
        news = News(text, token_ids, answer.logprobs[told.logprobs :])
        told.logprobs = len(answer.logprobs)
        told.token_ids += 0 if token_ids is UNSET else len(token_ids)
        return news

    def _usage(self) -> Usage:
        prompt = self._generation.prompt_tokens
        completion = sum(answer.completion_tokens for answer in self._answers)
        cached = PromptTokensDetails(self._generation.cached_tokens)
        return Usage(prompt, completion, prompt + completion, cached)

    async def _timings(self) -> Timings | UnsetType:
        if not self._with_timings:
            return UNSET
        await self._generation.settle(SETTLE_S)
        return self._generation.timings()


async def _off_loop_if_many(positions: int, work: Callable[[], T]) -> T:
    """What `work` returns, computed on another thread when so many log probabilities would stop all streams."""
    return await asyncio.to_thread(work) if positions > _MANY_LOGPROBS else work()
