"""Answers in the words of LightLLM, and of TGI, whose frames hold the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from epd.errors import EPDError
from epd.types import FinishReason
from proxy.api.dialect import PING, News, Timings
from proxy.api.http import STREAM_HEADERS, error_body
from proxy.api.openai.logprobs import VERY_UNLIKELY
from proxy.api.openai.objects import Usage
from proxy.text.answer import Answer, Piece


class StreamToken(Struct):
    """A token of a stream."""

    id: int
    text: str
    logprob: float
    special: bool
    count_output_tokens: int
    prompt_tokens: int


class StreamFrame(Struct):
    """One generated token. The last one says why it is the last."""

    token: StreamToken
    generated_text: str | None = None
    finished: bool = False
    finish_reason: str | None = None
    details: dict[str, Any] | None = None
    error: dict[str, Any] | UnsetType = UNSET
    index: int | UnsetType = UNSET
    top_tokens: list[Any] | UnsetType = UNSET


class DetailedToken(Struct):
    """A token of `return_details`."""

    id: int
    text: str
    logprob: float
    cumlogprob: float
    special: bool
    count_output_tokens: int
    prompt_tokens: int


class NativeAnswer(Struct):
    """Answer of LightLLM's `POST /generate`. With several samples, all but the text are lists too."""

    generated_text: list[str]
    count_output_tokens: int | list[int]
    finish_reason: str | list[str]
    prompt_tokens: int
    tokens: list[Any] | UnsetType = UNSET


class TGIAnswer(Struct):
    """Answer of TGI's `POST /generate`; on `POST /` it is in a list."""

    generated_text: str
    details: dict[str, Any] | UnsetType = UNSET


class NativeDialect:
    """`/generate` and `/generate_stream` of LightLLM.

    Args:
        special_ids: of the vocabulary.
        with_details: tell the tokens of a whole answer.
    """

    headers: Mapping[str, str] = STREAM_HEADERS
    ping = PING
    tells_every_token = True

    def __init__(self, special_ids: frozenset[int], *, with_details: bool) -> None:
        self._special_ids = special_ids
        self._with_details = with_details
        self._made = 0
        """Tokens told so far."""
        self._prompt_tokens = 0
        self._last: Piece | None = None
        """What the frame that ends the stream is about."""

    def opening(self, index: int) -> bytes:
        """Nothing: the first frame is the first token."""
        return b""

    def prompt(self, index: int, answer: Answer) -> bytes:
        """Nothing."""
        return b""

    def chunk(self, index: int, news: News) -> bytes:
        """A frame for each token; the last of the answer waits for `closing`."""
        self._prompt_tokens = news.prompt_tokens or self._prompt_tokens
        pieces = list(news.pieces)
        if news.is_last:
            self._last = pieces.pop() if pieces else Piece(-1, news.text, None)
        return b"".join([self._frame(piece) for piece in pieces])

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """The last token, with the reason. One that was told before its end was known comes again, without text."""
        self._prompt_tokens = news.prompt_tokens or self._prompt_tokens
        last = self._last or Piece(-1, "", None)
        if last.token_id < 0:  # no token came with the end
            self._made -= 1
            if answer.pieces:
                told = answer.pieces[-1]
                last = Piece(told.token_id, last.text, told.logprob)
        return self._last_frame(last, answer)

    def end(self, usage: Usage) -> bytes:
        """Nothing: the last frame was the end."""
        return b""

    def failed(self, error: EPDError) -> bytes:
        """A frame with the usual keys, and the error."""
        token = StreamToken(-1, "", 0.0, True, self._made, self._prompt_tokens)
        return _frame(
            StreamFrame(token, finished=True, finish_reason=FinishReason.ERROR.value, error=error_body(error)["error"])
        )

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> Any:
        """The answer in one piece."""
        counts, reasons = [one.completion_tokens for one in answers], [_reason(one) for one in answers]
        tokens = [self._details(one, usage.prompt_tokens) for one in answers] if self._with_details else None
        is_single = len(answers) == 1
        return NativeAnswer(
            generated_text=[one.text for one in answers],
            count_output_tokens=counts[0] if is_single else counts,
            finish_reason=reasons[0] if is_single else reasons,
            prompt_tokens=usage.prompt_tokens,
            tokens=UNSET if tokens is None else (tokens[0] if is_single else tokens),
        )

    def _frame(self, piece: Piece) -> bytes:
        return _frame(StreamFrame(self._token(piece)))

    def _last_frame(self, piece: Piece, answer: Answer) -> bytes:
        return _frame(StreamFrame(self._token(piece), finished=True, finish_reason=_reason(answer)))

    def _token(self, piece: Piece) -> StreamToken:
        self._made += 1
        is_special = piece.token_id in self._special_ids
        return StreamToken(
            piece.token_id, piece.text, finite(piece.logprob), is_special, self._made, self._prompt_tokens
        )

    def _details(self, answer: Answer, prompt_tokens: int) -> list[DetailedToken]:
        found, total = [], 0.0
        for count, piece in enumerate(answer.pieces, 1):
            logprob = finite(piece.logprob)
            total += logprob
            is_special = piece.token_id in self._special_ids
            found.append(DetailedToken(piece.token_id, piece.text, logprob, total, is_special, count, prompt_tokens))
        return found


class TGIDialect(NativeDialect):
    """The same for clients of TGI: one text, reasons in its words, and its `details`.

    Args:
        special_ids: of the vocabulary.
        with_details: tell how it ended and, of a whole answer, the tokens.
        prefix: what the text begins with: the prompt, where it is to be given back.
        seed: of the first sample.
        in_list: put a whole answer into a list, as on `POST /`.
    """

    def __init__(
        self, special_ids: frozenset[int], *, with_details: bool, prefix: str, seed: int | None, in_list: bool
    ) -> None:
        super().__init__(special_ids, with_details=with_details)
        self._prefix = prefix
        self._seed = seed
        self._in_list = in_list

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> Any:
        """The likeliest answer; the others are part of the details."""
        ranked = sorted(answers, key=lambda one: -one.mean_logprob)
        best, others = ranked[0], ranked[1:]
        body = TGIAnswer(self._prefix + best.text)
        if self._with_details:
            body.details = self._told(best, usage.prompt_tokens)
            if others:
                body.details["best_of_sequences"] = [
                    {"generated_text": self._prefix + one.text} | self._told(one, usage.prompt_tokens) for one in others
                ]
        return [body] if self._in_list else body

    def _told(self, answer: Answer, prompt_tokens: int) -> dict[str, Any]:
        return self._summary(answer, prompt_tokens) | {"prefill": [], "tokens": self._details(answer, prompt_tokens)}

    def _summary(self, answer: Answer, prompt_tokens: int) -> dict[str, Any]:
        return {
            "finish_reason": _tgi_reason(answer),
            "generated_tokens": answer.completion_tokens,
            "seed": self._seed,
            "prompt_tokens": prompt_tokens,
            "input_length": prompt_tokens,
        }

    def _frame(self, piece: Piece) -> bytes:
        token = self._token(piece)
        return _frame(StreamFrame(token, index=self._made, top_tokens=[]))

    def _last_frame(self, piece: Piece, answer: Answer) -> bytes:
        token = self._token(piece)
        return _frame(
            StreamFrame(
                token,
                generated_text=self._prefix + answer.text,
                finished=True,
                finish_reason=_tgi_reason(answer),
                details=self._summary(answer, self._prompt_tokens) if self._with_details else None,
                index=self._made,
                top_tokens=[],
            )
        )


def _frame(frame: StreamFrame) -> bytes:
    """One event; there is no blank behind the colon in this dialect."""
    return b"data:%b\n\n" % msgspec.json.encode(frame)


def _reason(answer: Answer) -> str:
    assert answer.finish_reason is not None
    return answer.finish_reason.value


def _tgi_reason(answer: Answer) -> str:
    if answer.finish_reason is not FinishReason.STOP:
        return _reason(answer)
    return "stop_sequence" if answer.has_stop else "eos_token"


def finite(logprob: float | None) -> float:
    """A number that JSON has."""
    return 0.0 if logprob is None else max(logprob, VERY_UNLIKELY)
