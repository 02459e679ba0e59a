"""Answers of the OpenAI dialect: whole, and as streams of chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import UNSET, UnsetType

from epd.errors import EPDError
from proxy.answer import Answer, TextOptions
from proxy.api.http import Client, error_body
from proxy.api.openai_schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    PromptTokensDetails,
    TextChoice,
    TextCompletion,
    Usage,
)
from proxy.generation import Generation
from proxy.tokenizer import Tokenizer
from proxy.work import Update

FIRST_OUTPUT_GRACE_S = 5.0
"""Status and headers wait so long for the first output, so that what fails early gets a real status."""
PING_INTERVAL_S = 15.0
SETTLE_S = 0.25
"""An answer with timings waits so long for encoders that have not reported yet."""

Timings = dict[str, float]
TokenIds = list[int] | UnsetType


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer share."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Head:
        """A head with an unguessable id such as `chatcmpl-…`."""
        return cls(f"{prefix}-{secrets.token_hex(16)}", int(time.time()), model)


class Dialect(Protocol):
    """How an endpoint words its answers."""

    def opening(self, index: int) -> Any | None:
        """The first chunk of a sample, if there is one."""

    def chunk(self, index: int, text: str, token_ids: TokenIds = UNSET) -> Any:
        """New text, and its tokens if the client wants them."""

    def closing(self, index: int, reason: str, token_ids: TokenIds, timings: Timings | UnsetType) -> Any:
        """The end of a sample."""

    def usage(self, usage: Usage) -> Any:
        """The last chunk, which has no choices."""

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> Any:
        """The answer in one piece."""


class ChatDialect:
    """`/v1/chat/completions`.

    Args:
        head: shared by all chunks.
        include_usage: whether a usage chunk will come; then the others say `usage: null`.
    """

    def __init__(self, head: Head, *, include_usage: bool) -> None:
        self._head = head
        self._no_usage: UnsetType | None = None if include_usage else UNSET

    def opening(self, index: int) -> ChatChunk:
        """The role, once."""
        return self._chunk([ChunkChoice(index, Delta(role="assistant", content=""))])

    def chunk(self, index: int, text: str, token_ids: TokenIds = UNSET) -> ChatChunk:
        """New text."""
        return self._chunk([ChunkChoice(index, Delta(content=text), token_ids=token_ids)])

    def closing(self, index: int, reason: str, token_ids: TokenIds, timings: Timings | UnsetType) -> ChatChunk:
        """An empty delta with the reason."""
        return self._chunk([ChunkChoice(index, Delta(), reason, token_ids=token_ids)], timings=timings)

    def usage(self, usage: Usage) -> ChatChunk:
        """Token counts."""
        return self._chunk([], usage)

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> ChatCompletion:
        """The answer in one piece."""
        choices = [
            ChatChoice(i, AnswerMessage(one.text), _reason(one), token_ids=one.token_ids)
            for i, one in enumerate(answers)
        ]
        head = self._head
        return ChatCompletion(head.id, head.created, head.model, choices, usage, timings=timings)

    def _chunk(
        self, choices: list[ChunkChoice], usage: Usage | None = None, timings: Timings | UnsetType = UNSET
    ) -> ChatChunk:
        head = self._head
        return ChatChunk(head.id, head.created, head.model, choices, usage=usage or self._no_usage, timings=timings)


class TextDialect:
    """`/v1/completions`.

    Args:
        head: shared by all chunks.
        include_usage: as in `ChatDialect`.
        echoes: text to begin each sample with.
    """

    def __init__(self, head: Head, *, include_usage: bool, echoes: Sequence[str]) -> None:
        self._head = head
        self._no_usage: UnsetType | None = None if include_usage else UNSET
        self._echoes = echoes

    def opening(self, index: int) -> TextCompletion | None:
        """The prompt, when it is to be echoed."""
        return self.chunk(index, self._echoes[index]) if self._echoes[index] else None

    def chunk(self, index: int, text: str, token_ids: TokenIds = UNSET) -> TextCompletion:
        """New text."""
        return self._make([TextChoice(index, text, token_ids=token_ids)])

    def closing(self, index: int, reason: str, token_ids: TokenIds, timings: Timings | UnsetType) -> TextCompletion:
        """No text, the reason."""
        return self._make([TextChoice(index, "", reason, token_ids=token_ids)], timings=timings)

    def usage(self, usage: Usage) -> TextCompletion:
        """Token counts."""
        return self._make([], usage)

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> TextCompletion:
        """The answer in one piece."""
        choices = [
            TextChoice(i, self._echoes[i] + one.text, _reason(one), token_ids=one.token_ids)
            for i, one in enumerate(answers)
        ]
        return self._make(choices, usage, timings)

    def _make(
        self, choices: list[TextChoice], usage: Usage | None = None, timings: Timings | UnsetType = UNSET
    ) -> TextCompletion:
        head = self._head
        return TextCompletion(
            head.id, head.created, head.model, choices, usage=usage or self._no_usage, timings=timings
        )


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
        self._answers = [Answer(tokenizer, options) for _ in range(generation.num_samples)]
        self._with_timings = with_timings
        self._told = [0] * generation.num_samples
        """How many token ids of each sample the stream has told."""

    async def tell_whole(self, client: Client) -> None:
        """Wait for the end, answer once.

        Raises:
            EPDError: the request failed; nothing was sent.
        """
        while not self._generation.done:
            for update in await self._generation.next():
                await self._advance(update)
        await client.reply(self._dialect.whole(self._answers, self._usage(), await self._timings()))

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
        text = await self._advance(update)
        if text:
            await client.event(self._dialect.chunk(update.index, text, self._new_token_ids(update.index)))
        reason = self._answers[update.index].finish_reason
        if reason is not None:
            rest = self._new_token_ids(update.index)
            await client.event(self._dialect.closing(update.index, reason.value, rest, await self._timings()))

    async def _advance(self, update: Update) -> str:
        answer = self._answers[update.index]
        text = answer.push(update)
        if answer.finish_reason is not None:
            await self._generation.finish(update.index)
        return text

    def _new_token_ids(self, index: int) -> TokenIds:
        """Tokens that no chunk has told yet; those of text that was held back come with the text."""
        all_ids = self._answers[index].token_ids
        if all_ids is UNSET:
            return UNSET
        told, self._told[index] = self._told[index], len(all_ids)
        return all_ids[told:]

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


def _reason(answer: Answer) -> str:
    assert answer.finish_reason is not None
    return answer.finish_reason.value
