"""Answers in the words of the OpenAI dialect: whole, and as chunks of streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from proxy.api.dialect import DONE, Head, News, ServerSent, TextEvents, Timings, server_sent
from proxy.api.openai.logprobs import (
    Echo,
    TokenNames,
    TokensAsIds,
    chat_logprobs,
    joined,
    prompt_logprobs,
    text_logprobs,
)
from proxy.api.openai.objects import (
    AnswerCall,
    AnswerCallDelta,
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    FunctionCall,
    FunctionDelta,
    PromptLogprobs,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    Usage,
)
from proxy.text.answer import Answer, ShownToken
from proxy.text.token_text import TokenTexts
from proxy.tools.calls import CallDelta


class UsageSoFar:
    """Token counts of an answer under way: made before who can count them is known."""

    def __init__(self) -> None:
        self.count: Callable[[], Usage] | None = None
        """Who counts."""

    def __call__(self) -> Usage | None:
        """What is counted so far."""
        return None if self.count is None else self.count()


class Wanted(msgspec.Struct, frozen=True):
    """What an answer holds besides the text."""

    texts: TokenTexts
    usage: bool = False
    """A usage chunk will come at the end of a stream; then the others say `usage: null`."""
    logprobs: int | None = None
    """Log probabilities of each token, and of so many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for the prompt."""
    function_call: bool = False
    """Tool calls in their deprecated form: one, without an id."""
    names_once: bool = False
    """Chunks that go on with a tool call have no name, not even null."""
    tokens_as_ids: bool = False
    """Call tokens by their ids in log probabilities."""
    prompt_token_ids: Sequence[Sequence[int]] = ()
    """Of each prompt, if the client wants them."""
    begun: str = ""
    """Text that the answer begins with."""
    usage_so_far: UsageSoFar | None = None
    """Where each chunk asks for its token counts, if it is to tell them."""

    def of_prompt(self, answer: Answer) -> PromptLogprobs | UnsetType:
        """The field `prompt_logprobs`, if there is to be one."""
        if self.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(answer.prompt_logprobs, self.texts, self.prompt_logprobs)

    @property
    def names(self) -> TokenNames:
        """What tokens are called in log probabilities."""
        return TokensAsIds(self.texts) if self.tokens_as_ids else self.texts

    def prompt_ids(self, prompt: int) -> Sequence[int] | UnsetType:
        """The field `prompt_token_ids` of a prompt, if there is to be one."""
        return self.prompt_token_ids[prompt] if self.prompt_token_ids else UNSET

    @property
    def usage_of_chunk(self) -> Usage | UnsetType | None:
        """The field `usage` of a chunk that is not the last."""
        if self.usage_so_far is not None:
            return self.usage_so_far()
        return None if self.usage else UNSET


class ChatDialect(ServerSent):
    """`/v1/chat/completions`.

    Args:
        head: shared by all chunks.
        wanted: besides the text.
    """

    def __init__(self, head: Head, wanted: Wanted) -> None:
        self._head = head
        self._wanted = wanted
        self._texts: dict[int, TextEvents] = {}

    def opening(self, index: int) -> bytes:
        """The role, once."""
        choice = ChunkChoice(index, Delta(role="assistant", content=self._wanted.begun))
        return self._chunk([choice], prompt_token_ids=self._wanted.prompt_ids(0))

    def chunk(self, index: int, news: News) -> bytes:
        """New text, then news of calls, each in a chunk of its own. Tokens come with the first of them."""
        if news.is_text_alone and self._wanted.usage_so_far is None:
            events = self._texts.get(index)
            if events is None:
                events = TextEvents(lambda text: self._chunk([ChunkChoice(index, Delta(content=text))]))
                self._texts[index] = events
            return events.event(news.text)
        logprobs = self._logprobs(news.shown) if news.shown else None
        deltas = [Delta(content=news.text)] if news.text or not news.calls else []
        deltas += [self._call_delta(call) for call in news.calls]
        first = self._chunk([ChunkChoice(index, deltas[0], logprobs=logprobs, token_ids=news.token_ids)])
        return first + b"".join(self._chunk([ChunkChoice(index, delta)]) for delta in deltas[1:])

    def _call_delta(self, call: CallDelta) -> Delta:
        is_told = call.name is None and self._wanted.names_once
        function = FunctionDelta(UNSET if is_told else call.name, call.arguments)
        if self._wanted.function_call:
            return Delta(function_call=function)
        if call.id is None:
            return Delta(tool_calls=[AnswerCallDelta(call.index, function)])
        return Delta(tool_calls=[AnswerCallDelta(call.index, function, call.id, "function")])

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """An empty delta with the reason."""
        logprobs = self._logprobs(news.shown) if news.shown else None
        choice = ChunkChoice(index, Delta(), self._reason(answer), logprobs, news.token_ids, answer.stop_reason)
        return self._chunk([choice], timings=timings)

    def end(self, usage: Usage) -> bytes:
        """Token counts, if they are wanted."""
        return (self._chunk([], usage) if self._wanted.usage else b"") + DONE

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> ChatCompletion:
        """The answer in one piece."""
        head = self._head
        return ChatCompletion(
            head.id,
            head.created,
            head.model,
            [self._choice(index, answer) for index, answer in enumerate(answers)],
            usage,
            system_fingerprint=head.system_fingerprint,
            timings=timings,
            prompt_logprobs=self._wanted.of_prompt(answers[0]),
            prompt_token_ids=self._wanted.prompt_ids(0),
        )

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        logprobs = self._logprobs(answer.logprobs)
        reason = self._reason(answer)
        return ChatChoice(index, self._message(answer), reason, logprobs, answer.token_ids, answer.stop_reason)

    def _message(self, answer: Answer) -> AnswerMessage:
        calls = [AnswerCall(call.id, FunctionCall(call.name, call.arguments)) for call in answer.tool_calls]
        text = self._wanted.begun + answer.text
        message = AnswerMessage(text if text or not calls else None)
        if calls and self._wanted.function_call:
            message.function_call = calls[0].function
        elif calls:
            message.tool_calls = calls
        return message

    def _reason(self, answer: Answer) -> str:
        reason = answer.reason
        return "function_call" if reason == "tool_calls" and self._wanted.function_call else reason

    def _logprobs(self, shown: Sequence[ShownToken]) -> ChatLogprobs | None:
        top = self._wanted.logprobs
        return None if top is None else chat_logprobs(shown, self._wanted.names, top)

    def _chunk(
        self,
        choices: list[ChunkChoice],
        usage: Usage | None = None,
        timings: Timings | UnsetType = UNSET,
        prompt_token_ids: Sequence[int] | UnsetType = UNSET,
    ) -> bytes:
        head = self._head
        return server_sent(
            ChatChunk(
                head.id,
                head.created,
                head.model,
                choices,
                system_fingerprint=head.system_fingerprint,
                usage=usage or self._wanted.usage_of_chunk,
                timings=timings,
                prompt_token_ids=prompt_token_ids,
            )
        )


class TextDialect(ServerSent):
    """`/v1/completions`.

    Args:
        head: shared by all chunks.
        wanted: besides the text.
        echoes: prompts to begin their samples with, or none.
        samples: made of each prompt.
        n: shown of each prompt, those with the likeliest tokens.
    """

    def __init__(self, head: Head, wanted: Wanted, *, echoes: Sequence[Echo], samples: int, n: int) -> None:
        self._head = head
        self._wanted = wanted
        self._echoes = echoes
        self._samples = samples
        self._n = n
        self._texts: dict[int, TextEvents] = {}

    def opening(self, index: int) -> bytes:
        """The prompt, when it is to be echoed. With log probabilities it waits for those."""
        echo, ids = self._echo(index), self._wanted.prompt_ids(index // self._samples)
        text = "" if echo is None or self._wanted.logprobs is not None else echo.text
        if not text and ids is UNSET:
            return b""
        return self._event([TextChoice(index, text, prompt_token_ids=ids)])

    def prompt(self, index: int, answer: Answer) -> bytes:
        """The prompt and its log probabilities, when it is to be echoed."""
        echo, top = self._echo(index), self._wanted.logprobs
        if echo is None or top is None:
            return b""
        return self._event([TextChoice(index, echo.text, logprobs=self._logprobs_of_echo(echo, answer, top))])

    def chunk(self, index: int, news: News) -> bytes:
        """New text."""
        if news.is_text_alone and self._wanted.usage_so_far is None:
            events = self._texts.get(index)
            if events is None:
                events = self._texts[index] = TextEvents(lambda text: self._event([TextChoice(index, text)]))
            return events.event(news.text)
        logprobs = self._logprobs(index, news.shown) if news.shown else None
        return self._event([TextChoice(index, news.text, logprobs=logprobs, token_ids=news.token_ids)])

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """No text, the reason."""
        logprobs = self._logprobs(index, news.shown) if news.shown else None
        choice = TextChoice(
            index, "", answer.reason, logprobs, token_ids=news.token_ids, stop_reason=answer.stop_reason
        )
        return self._event([choice], timings=timings)

    def end(self, usage: Usage) -> bytes:
        """Token counts, if they are wanted."""
        return (self._event([], usage) if self._wanted.usage else b"") + DONE

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> TextCompletion:
        """The answer in one piece."""
        choices = [self._choice(place, index, answers[index]) for place, index in enumerate(self._best(answers))]
        return self._make(choices, usage, timings)

    def _best(self, answers: Sequence[Answer]) -> list[int]:
        """Indices of those to show: `n` of each prompt. In the order they were made, if that is all of them."""
        if self._samples == self._n:
            return list(range(len(answers)))
        best: list[int] = []
        for first in range(0, len(answers), self._samples):
            samples = range(first, first + self._samples)
            best += sorted(samples, key=lambda index: -answers[index].mean_logprob)[: self._n]
        return best

    def _choice(self, place: int, index: int, answer: Answer) -> TextChoice:
        echo, top = self._echo(index), self._wanted.logprobs
        logprobs = self._logprobs(index, answer.logprobs)
        if logprobs is not None and echo is not None and top is not None:
            logprobs = joined(self._logprobs_of_echo(echo, answer, top), logprobs)
        return TextChoice(
            place,
            (echo.text if echo else "") + answer.text,
            answer.reason,
            logprobs,
            answer.token_ids,
            self._wanted.of_prompt(answer),
            answer.stop_reason,
            self._wanted.prompt_ids(index // self._samples),
        )

    def _echo(self, index: int) -> Echo | None:
        return self._echoes[index // self._samples] if self._echoes else None

    def _logprobs(self, index: int, shown: Sequence[ShownToken]) -> TextLogprobs | None:
        top, echo = self._wanted.logprobs, self._echo(index)
        return None if top is None else text_logprobs(shown, self._wanted.names, top, len(echo.text) if echo else 0)

    def _logprobs_of_echo(self, echo: Echo, answer: Answer, top: int) -> TextLogprobs:
        return echo.logprobs(answer.prompt_logprobs, self._wanted.names, top)

    def _event(
        self, choices: list[TextChoice], usage: Usage | None = None, timings: Timings | UnsetType = UNSET
    ) -> bytes:
        return server_sent(self._make(choices, usage, timings))

    def _make(
        self, choices: list[TextChoice], usage: Usage | None = None, timings: Timings | UnsetType = UNSET
    ) -> TextCompletion:
        head = self._head
        return TextCompletion(
            head.id,
            head.created,
            head.model,
            choices,
            system_fingerprint=head.system_fingerprint,
            usage=usage or self._wanted.usage_of_chunk,
            timings=timings,
        )
