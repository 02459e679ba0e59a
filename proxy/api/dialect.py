"""What an endpoint's words are made of: the interface between reading a generation and wording its answer.

`proxy.api.teller` reads tokens, makes text and decides when something is to be told; a `Dialect` says it, as bytes that
are ready for the socket, so that a stream costs one write for all that came in one step.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from epd.errors import EPDError
from proxy.api.http import STREAM_HEADERS, error_body
from proxy.api.openai.objects import Usage
from proxy.randomness import random_piece
from proxy.text.answer import Answer, Piece, ShownToken
from proxy.tools.calls import CallDelta

Timings = dict[str, float]
"""Stage → milliseconds."""
TokenIds = list[int] | UnsetType

DONE = b"data: [DONE]\n\n"
"""What ends OpenAI's streams."""
PING = b": ping\n\n"
"""A comment, for which readers of server-sent events have no use."""


def server_sent(value: Any) -> bytes:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html) with `value` as JSON."""
    return b"data: %b\n\n" % _encode(value)


def named_event(name: str, value: Any) -> bytes:
    """The same with a name, by which some readers tell events apart."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode(value))


class TextEvents:
    """Events that differ in one text alone: all around it is encoded once.

    Args:
        make: the event with a text.
    """

    def __init__(self, make: Callable[[str], bytes]) -> None:
        mark = secrets.token_hex(16)
        self._before, _, self._after = make(mark).partition(b'"%b"' % mark.encode())

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return b"%b%b%b" % (self._before, _encode(text), self._after)


_encode = msgspec.json.Encoder().encode


class Head(msgspec.Struct, frozen=True):
    """What all chunks of an answer share."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    """Names what made the answer: equal seeds give equal answers while it stays the same."""

    @classmethod
    def new(cls, prefix: str, model: str, checkpoint: str = "") -> Head:
        """A head with an unguessable id such as `chatcmpl-…`; `checkpoint`: the model's fingerprint."""
        system = f"fp_{checkpoint[:12]}" if checkpoint else None
        return cls(unguessable(prefix), int(time.time()), model, system)


def unguessable(prefix: str) -> str:
    """A new id: `chatcmpl-…`, or `resp_…` where the prefix ends with its own `_`."""
    return f"{prefix}{'' if prefix.endswith('_') else '-'}{random_piece().hex()}"


class News(msgspec.Struct, frozen=True):
    """What is to be told of a sample."""

    text: str = ""
    token_ids: TokenIds = UNSET
    """If the client wants them."""
    shown: Sequence[ShownToken] = ()
    """Tokens of the text, if the client wants log probabilities."""
    calls: Sequence[CallDelta] = ()
    """Of tool calls. Where there are some, there may be no text."""
    pieces: Sequence[Piece] = ()
    """The tokens, with text or without, if the client wants the text token by token."""
    prompt_tokens: int = 0
    """If the dialect tells every token."""
    is_last: bool = False
    """The sample's `closing` follows at once."""

    @property
    def is_text_alone(self) -> bool:
        """Whether there is nothing but text, as in most."""
        return self.token_ids is UNSET and not self.shown and not self.calls

    def in_order(self) -> Iterator[str | CallDelta]:
        """Text and calls, for dialects that tell one after the other: what goes on with a call that was told before
        stands first."""
        goes_on = list(takewhile(lambda delta: delta.id is None, self.calls))
        yield from goes_on
        if self.text:
            yield self.text
        yield from self.calls[len(goes_on) :]


class Dialect(Protocol):
    """How an endpoint words its answers. One is made for each request.

    A stream is what `opening` gives for each sample; `prompt`, `chunk` and `closing` as things happen, samples
    interleaved; then `end`; or, at any point, `failed` instead of all that would have followed.
    """

    headers: Mapping[str, str]
    """Of a stream."""
    ping: bytes
    """Keeps a silent stream open, and means nothing."""
    tells_every_token: bool
    """Whether `chunk` is wanted for tokens without text too: part of a character, or what may become a stop string."""

    def opening(self, index: int) -> bytes:
        """What a sample begins with."""

    def prompt(self, index: int, answer: Answer) -> bytes:
        """The log probabilities of the prompt just came."""

    def chunk(self, index: int, news: News) -> bytes:
        """New text, or news of tool calls, or both: the text stands first."""

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """A sample is over; the news are what was held back and has no text."""

    def end(self, usage: Usage) -> bytes:
        """All samples are over."""

    def failed(self, error: EPDError) -> bytes:
        """The request failed; nothing follows."""

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> Any:
        """The answer in one piece, which becomes JSON."""


class ServerSent:
    """What dialects of server-sent events share: frames as OpenAI sends them."""

    headers: Mapping[str, str] = STREAM_HEADERS
    ping = PING
    tells_every_token = False

    def prompt(self, index: int, answer: Answer) -> bytes:
        """Nothing: most dialects do not stream the prompt's log probabilities."""
        return b""

    def failed(self, error: EPDError) -> bytes:
        """An event with the error, and the end."""
        return server_sent({"error": error_body(error)["error"]}) + DONE
