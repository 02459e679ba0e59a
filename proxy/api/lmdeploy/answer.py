"""Answers in the words of LMDeploy's native endpoints: JSON objects, each with a byte behind it that ends its frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from epd.errors import EPDError
from proxy.api.dialect import News, Timings
from proxy.api.http import STREAM_HEADERS, error_body
from proxy.api.lmdeploy.schema import LMDeployAnswer
from proxy.api.lmdeploy.session_turns import Told
from proxy.api.openai.objects import Usage
from proxy.text.answer import Answer


@dataclass(frozen=True)
class Framing:
    """How an endpoint's stream is cut into frames."""

    delimiter: bytes
    headers: Mapping[str, str]
    counts_in_all: bool = False
    """Whether all frames tell the tokens of the prompt, as opposed to the last one."""


OLD = Framing(b"\0", {**STREAM_HEADERS, "content-type": "application/octet-stream"})
"""`/generate`."""
INTERACTIVE = Framing(b"\n", STREAM_HEADERS, counts_in_all=True)
"""`/v1/chat/interactive`, whose frames are no server-sent events, whatever the label says."""


class LMDeployDialect:
    """Frames `{text, tokens, finish_reason}`: readers take all three keys for granted. The last frame has a reason.

    Args:
        framing: of the endpoint.
        told: of the turn.
    """

    tells_every_token = False

    def __init__(self, framing: Framing, told: Told) -> None:
        self.headers = framing.headers
        self.ping = framing.delimiter
        self._framing = framing
        self._turn = told
        self._frames = 0
        self._tokens = 0

    def opening(self, index: int) -> bytes:
        """Nothing."""
        return b""

    def prompt(self, index: int, answer: Answer) -> bytes:
        """Nothing."""
        return b""

    def chunk(self, index: int, news: News) -> bytes:
        """New text."""
        self._tokens += 0 if news.token_ids is UNSET else len(news.token_ids)
        return self._frame(LMDeployAnswer(news.text, self._tokens, None))

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """The last frame. There is one before it, except where the session is full: benchmarks measure from first to
        last."""
        first = b"" if self._frames or self._turn.exceeded else self._frame(LMDeployAnswer("", 0, None))
        return first + self._frame(self._whole(answer, ""))

    def end(self, usage: Usage) -> bytes:
        """Nothing more."""
        return b""

    def failed(self, error: EPDError) -> bytes:
        """A frame with the error."""
        inner = error_body(error)["error"]
        return self._frame(LMDeployAnswer("", self._tokens, "error", error=inner))

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> LMDeployAnswer:
        """The answer in one piece."""
        return self._whole(answers[0], answers[0].text)

    def _whole(self, answer: Answer, text: str) -> LMDeployAnswer:
        assert answer.finish_reason is not None
        turn = self._turn
        return LMDeployAnswer(
            text,
            answer.completion_tokens,
            answer.finish_reason.value,
            turn.input_tokens,
            turn.history_tokens,
            turn.session_id,
            turn.exceeded or UNSET,
        )

    def _frame(self, answer: LMDeployAnswer) -> bytes:
        self._frames += 1
        if self._framing.counts_in_all:
            answer.input_tokens, answer.history_tokens = self._turn.input_tokens, self._turn.history_tokens
        return msgspec.json.encode(answer) + self._framing.delimiter
