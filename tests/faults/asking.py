"""One request as a careful client makes it: with retries where the server asks for them, and a verdict at the end.

    right     the answer, token for token, perhaps after explicit refusals
    failed    an explicit error: a status, or an error event in a stream
    lost      a stream that ends without its end, other tokens, or no news for `HANG_S`: what must never happen

Refusals are what a client may try again elsewhere: nobody listens (connection refused), a connection that breaks before
the first byte of an answer, 429 and 503 with Retry-After. Connections are not reused, so that none of this can hide
behind a connection that idled.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum

from epd.bench.http_client import HttpClient, ServerGone
from epd.bench.soak_requests import PATH, Answer, Collector, CutOff, RequestFailed, SoakRequest

HANG_S = 65.0
"""Longer than requests may take (`--request-timeout` of the cluster)."""
RETRY_FOR_S = 20.0
"""A client gives up so long after its first try."""
_LONGEST_PAUSE_S = 2.0
_RETRYABLE = (429, 503)


class Verdict(StrEnum):
    """How a request ended."""

    RIGHT = "right"
    FAILED = "failed"
    LOST = "lost"


@dataclass
class Wait:
    """A time without news of a running answer, of those that the traffic saw."""

    ended: float
    seconds: float


@dataclass
class Outcome:
    """One request as its client saw it. Moments in seconds of the monotonic clock."""

    kind: str
    stream: bool
    started: float
    verdict: Verdict = Verdict.LOST
    ended: float = 0.0
    reason: str = ""
    """Of a failure or a loss."""
    refusals: list[tuple[float, str]] = field(default_factory=list)
    """When, and what the server or the network said, of each try that was refused."""
    waits: list[Wait] = field(default_factory=list)
    """Of a stream: before each piece. Of an answer at once: the whole. Counted from the start of the request."""

    is_extra: bool = False
    """Not of the steady traffic: it counts, but not for latencies, which compare the steady traffic with itself."""

    @property
    def seconds(self) -> float:
        """From the start to the end, retries included."""
        return self.ended - self.started


def ignore(_: object) -> None:
    """Do nothing with it."""


class _Refused(Exception):
    def __init__(self, reason: str, pause_s: float) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class _Lost(Exception):
    """What must not happen."""


@dataclass(frozen=True)
class Asker:
    """Asks proxies.

    Args:
        urls: base URLs of the proxies, ending in `/v1`.
        excused: base URLs of proxies that were killed: a stream that breaks there was told to its client by the reset,
            and is tried again on another.
        retries: whether refusals are tried again, as long as `RETRY_FOR_S`.
    """

    urls: Sequence[str]
    excused: Set[str] = frozenset()
    retries: bool = True

    async def ask(
        self,
        request: SoakRequest,
        expected: Answer | None,
        *,
        stream: bool,
        first: int,
        on_piece: Callable[[bytes], None] = ignore,
        on_answer: Callable[[Answer], None] = ignore,
    ) -> Outcome:
        """Ask and judge. Never raises for what a server does.

        Args:
            request: what to ask.
            expected: the right answer; None: any.
            stream: as events or at once.
            first: index of the proxy to ask first; the next try asks the next one.
            on_piece: called with each piece of a body as it comes.
            on_answer: called with the answer, right or not.
        """
        outcome = Outcome(request.kind, stream, time.monotonic())
        try:
            answer = await self._until_answered(request, outcome, first, on_piece)
            on_answer(answer)
            is_right = expected in (None, answer)
            outcome.verdict = Verdict.RIGHT if is_right else Verdict.LOST
            outcome.reason = "" if is_right else f"another answer: {answer} instead of {expected}"
        except _Lost as loss:
            outcome.reason = str(loss)
        except RequestFailed as failure:
            outcome.verdict, outcome.reason = Verdict.FAILED, str(failure)
        outcome.ended = time.monotonic()
        return outcome

    async def answer(self, request: SoakRequest, *, first: int) -> Answer:
        """The answer of a proxy with nothing wrong. Raises RequestFailed, or what else went wrong."""
        return await self._until_answered(request, Outcome(request.kind, False, time.monotonic()), first)

    async def _until_answered(
        self, request: SoakRequest, outcome: Outcome, turn: int, on_piece: Callable[[bytes], None] = ignore
    ) -> Answer:
        body = request.body(stream=outcome.stream)
        while True:
            url = self.urls[turn % len(self.urls)]
            turn += 1
            try:
                return await self._try(url, body, outcome, on_piece)
            except _Refused as refusal:
                outcome.refusals.append((time.monotonic(), str(refusal)))
                if not self.retries or time.monotonic() > outcome.started + RETRY_FOR_S:
                    raise RequestFailed(f"refused: {refusal}") from refusal
                tried_all = len(outcome.refusals) % len(self.urls) == 0
                if tried_all:
                    await asyncio.sleep(refusal.pause_s * random.uniform(0.8, 1.2))

    async def _try(self, url: str, body: bytes, outcome: Outcome, on_piece: Callable[[bytes], None]) -> Answer:
        answer = _Timed(outcome, on_piece)
        client = HttpClient(url)
        asking = asyncio.ensure_future(client.request("POST", PATH, body, answer.feed, answer.header))
        try:
            while not asking.done():
                pieces = answer.pieces
                await asyncio.wait({asking}, timeout=HANG_S)
                if not asking.done() and answer.pieces == pieces:
                    raise _Lost(f"no news for {HANG_S:g} s")
            status = asking.result()
        except ServerGone as error:
            if answer.pieces == 0:
                raise _Refused(str(error), 0.1) from error
            if url in self.excused:
                raise _Refused(f"the proxy was killed in the middle: {error}", 0.1) from error
            raise _Lost(f"broken off in the middle: {error}") from error
        finally:
            if not asking.done():
                asking.cancel()
                await asyncio.wait({asking})
            client.close()
        if status in _RETRYABLE and answer.retry_after_s is not None:
            raise _Refused(f"status {status}: {answer.text()[:200]}", min(answer.retry_after_s, _LONGEST_PAUSE_S))
        if status != 200:
            raise RequestFailed(f"status {status}: {answer.text()[:200]}")
        answer.note_end()
        try:
            return answer.streamed() if outcome.stream else answer.whole()
        except CutOff as error:
            raise _Lost(str(error)) from error


class _Timed(Collector):
    """Notes how long the client waited for each piece."""

    def __init__(self, outcome: Outcome, on_piece: Callable[[bytes], None]) -> None:
        super().__init__()
        self._on_piece = on_piece
        self._outcome = outcome
        # A client waits from its first try on, whatever it was told meanwhile.
        self._last_news = outcome.waits[-1].ended if outcome.waits else outcome.started
        self.retry_after_s: float | None = None

    def feed(self, data: bytes) -> None:
        """Take a piece; comments, which keep a connection alive, are no news."""
        super().feed(data)
        self._on_piece(data)
        if self._outcome.stream and b"data:" in data:
            self._note()

    def header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and value.isdigit():
            self.retry_after_s = float(value)

    def note_end(self) -> None:
        """An answer at once is one long wait."""
        if not self._outcome.stream:
            self._note()

    def _note(self) -> None:
        now = time.monotonic()
        self._outcome.waits.append(Wait(now, now - self._last_news))
        self._last_news = now
