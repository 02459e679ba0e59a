"""Reads a generation and tells the client about it, in the words of a dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from epd.errors import EPDError
from proxy.api.dialect import Dialect, News, Timings
from proxy.api.http import Client
from proxy.api.openai.objects import PromptTokensDetails, Usage
from proxy.dispatch.generation import Generation
from proxy.dispatch.work import Update
from proxy.request_context import note_stream_error
from proxy.text.answer import Answer, TextOptions
from proxy.text.tokenizer import Tokenizer

T = TypeVar("T")

AtEnd = Callable[[Generation, Sequence[Answer]], Awaitable[None]]

FIRST_OUTPUT_GRACE_S = 5.0
"""Status and headers wait so long for the first output, so that what fails early gets a real status."""
PING_INTERVAL_S = 15.0
SETTLE_S = 0.25
"""An answer with timings waits so long for encoders that have not reported yet."""
_MANY_LOGPROBS = 1000
"""Positions from which an answer is put together off the event loop: each may name 20 tokens."""


class _Told(msgspec.Struct):
    """How much of a sample the stream has told."""

    token_ids: int = 0
    logprobs: int = 0
    pieces: int = 0
    calls: int = 0
    end: bool = False


class Teller:
    """Reads a generation and tells the client about it.

    Args:
        generation: in work; the caller closes it.
        dialect: words of the endpoint.
        tokenizer: of the model.
        options: how text is made.
        with_timings: whether the client asked where the time went.
        at_end: awaited once all samples are at their ends, before the client hears of it. The error that it raises is
            told instead.
    """

    def __init__(
        self,
        generation: Generation,
        dialect: Dialect,
        tokenizer: Tokenizer,
        options: TextOptions,
        *,
        with_timings: bool,
        at_end: AtEnd | None = None,
    ) -> None:
        self._generation = generation
        self._dialect = dialect
        work = generation.work
        self._answers = [Answer(tokenizer, options, prompt) for prompt in work.prompts for _ in range(work.n)]
        self._with_timings = with_timings
        self._at_end = at_end
        self._told = [_Told() for _ in range(generation.num_samples)]
        self._unsent = b""
        """Words of a stream that wait for others which are to go with them, in one write."""

    async def tell(self, client: Client, *, stream: bool) -> Sequence[Answer]:
        """Answer in one piece, or in a stream, in which a failure becomes its last words.

        Returns:
            The samples, each at its end; fewer words than that where a stream failed.

        Raises:
            EPDError: the request failed before anything was sent.
        """
        await (self._tell_stream(client) if stream else self._tell_whole(client))
        return self._answers

    async def _tell_whole(self, client: Client) -> None:
        while not self._generation.done:
            for update in await self._generation.next():
                await self._advance(update)
        await self._note_end()
        usage, timings = self.usage(), await self._timings()
        size = sum([len(one.logprobs) + len(one.prompt_logprobs) for one in self._answers])
        whole = partial(self._dialect.whole, self._answers, usage, timings)
        await client.reply(whole() if size <= _MANY_LOGPROBS else await asyncio.to_thread(whole))

    async def _tell_stream(self, client: Client) -> None:
        updates = await self._generation.next(FIRST_OUTPUT_GRACE_S)
        await client.start_stream(self._dialect.headers)
        try:
            await self._stream_samples(client, updates)
            self._unsent += self._dialect.end(self.usage())
        except EPDError as error:
            note_stream_error(error)
            self._unsent += self._dialect.failed(error)
        await client.catch_up()
        await client.end_stream(self._unsent)

    async def _stream_samples(self, client: Client, updates: list[Update]) -> None:
        """Tell all but the end."""
        self._unsent = b"".join(self._dialect.opening(index) for index in range(len(self._answers)))
        while True:
            for update in updates:
                words = self._words(update)
                self._unsent += await self._words_of_prompt(update) + words
            await self._end_samples()
            if self._generation.done:
                return
            if self._unsent:
                await client.write(self._unsent)
                self._unsent = b""
            updates = await self._generation.next(PING_INTERVAL_S, partial(self._tell_at_once, client))
            if client.lags:
                await client.catch_up()
            elif not (updates or self._generation.done or self._has_ends):
                self._unsent = self._dialect.ping

    def _tell_at_once(self, client: Client, update: Update) -> bool:
        """Implements `proxy.dispatch.consumer.Teller`."""
        words = self._words(update)
        if self._answers[update.index].finish_reason is not None:  # there is a stop string in it
            self._unsent += words
            return False
        return not words or client.write_now(words)

    async def _end_samples(self) -> None:
        """Say what there is to say about the ends of samples that have come to theirs."""
        for index in range(len(self._answers)):
            if self._has_end(index):
                self._told[index].end = True
                self._unsent += await self._words_at_end(index)

    def _has_end(self, index: int) -> bool:
        """Whether a sample has come to its end, and nothing was said about that."""
        return self._answers[index].finish_reason is not None and not self._told[index].end

    @property
    def _has_ends(self) -> bool:
        return any(map(self._has_end, range(len(self._answers))))

    def _words(self, update: Update) -> bytes:
        """What a dialect has to say about tokens. Every token of every stream passes here."""
        index, dialect = update.index, self._dialect
        if self._answers[index].finish_reason is not None:
            return b""  # it came behind a stop string, before the worker knew of that
        text = self._answers[index].push(update)
        is_news = text or len(self._answers[index].call_deltas) > self._told[index].calls
        if is_news or (dialect.tells_every_token and update.token_ids):
            return dialect.chunk(index, self._news(index, text))
        return b""

    async def _words_of_prompt(self, update: Update) -> bytes:
        """What a dialect has to say about the prompt, once its log probabilities came."""
        if not update.prompt_logprobs:
            return b""
        answer, dialect = self._answers[update.index], self._dialect
        return await _off_loop_if_many(len(update.prompt_logprobs), lambda: dialect.prompt(update.index, answer))

    async def _words_at_end(self, index: int) -> bytes:
        """What a dialect has to say about the end of a sample."""
        await self._generation.finish(index)
        await self._note_end()
        timings = await self._timings()
        return self._dialect.closing(index, self._answers[index], self._news(index, ""), timings)

    async def _note_end(self) -> None:
        if self._at_end is not None and all(answer.finish_reason is not None for answer in self._answers):
            await self._at_end(self._generation, self._answers)

    async def _advance(self, update: Update) -> str:
        answer = self._answers[update.index]
        text = answer.push(update)
        if answer.finish_reason is not None:
            await self._generation.finish(update.index)
        return text

    def _news(self, index: int, text: str) -> News:
        """The text with all that no chunk has told yet: what was held back comes with the text that it belongs to."""
        answer, told = self._answers[index], self._told[index]
        if answer.is_plain and not answer.logprobs and not self._dialect.tells_every_token:
            return News(text, is_last=answer.finish_reason is not None)
        token_ids = UNSET if answer.token_ids is UNSET else answer.token_ids[told.token_ids :]
        news = News(
            text,
            token_ids,
            answer.logprobs[told.logprobs :],
            answer.call_deltas[told.calls :],
            answer.pieces[told.pieces :],
            self._generation.prompt_tokens if self._dialect.tells_every_token else 0,
            answer.finish_reason is not None,
        )
        told.pieces = len(answer.pieces)
        told.logprobs, told.calls = len(answer.logprobs), len(answer.call_deltas)
        told.token_ids += 0 if token_ids is UNSET else len(token_ids)
        return news

    def usage(self) -> Usage:
        """Token counts so far; those of the prompt are known with the first output."""
        generation, work = self._generation, self._generation.work
        prompt = generation.prompt_tokens
        completion = sum([answer.completion_tokens for answer in self._answers])
        # Pictures come with a single prompt, in which each is one placeholder.
        text = sum(map(len, work.prompts)) - len(work.images) if work.images and prompt else prompt
        details = PromptTokensDetails(generation.cached_tokens, image_tokens=prompt - text, text_tokens=text)
        return Usage(prompt, completion, prompt + completion, details)

    async def _timings(self) -> Timings | UnsetType:
        if not self._with_timings:
            return UNSET
        await self._generation.settle(SETTLE_S)
        return self._generation.timings()


async def _off_loop_if_many(positions: int, work: Callable[[], T]) -> T:
    """What `work` returns, computed on another thread when so many log probabilities would stop all streams."""
    return await asyncio.to_thread(work) if positions > _MANY_LOGPROBS else work()
