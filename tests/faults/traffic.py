"""Steady mixed traffic with known answers: text and pictures, greedy and sampled, streamed and at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from epd.bench.soak_requests import Answer, SoakRequest, check_pool
from epd.bench.words import make_text
from epd.bench.workload import data_url, make_jpeg
from tests.faults.asking import Asker, Outcome, ignore

MODEL = "faults"
_PICTURE_SIZES = ((112, 112), (140, 84), (84, 140), (168, 112))
LONG = "long text"
_KINDS = ("text", "image", "sampled text", "sampled image", LONG, "two images")
_LONG_TOKENS = 240
_FILL_TIMEOUT_S = 5.0


def make_request(rng: random.Random, kind: str) -> SoakRequest:
    """A new request: its text, its pictures and its seed are its own."""
    count = {"text": 0, "sampled text": 0, LONG: 0, "two images": 2}.get(kind, 1)
    urls = [data_url(make_jpeg(rng, rng.choice(_PICTURE_SIZES))) for _ in range(count)]
    parts: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.append({"type": "text", "text": f"{make_text(rng, rng.randint(2, 24))}?"})
    sampling: dict[str, object] = {"temperature": 0}
    if kind.startswith("sampled"):
        sampling = {"temperature": 0.9, "seed": rng.randrange(1 << 31)}
    max_tokens = _LONG_TOKENS if kind == LONG else rng.randint(16, 48)
    fields = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "return_token_ids": True}
    return SoakRequest(kind, fields | sampling | {"max_tokens": max_tokens, "ignore_eos": True})


def make_pool(size: int, seed: int) -> list[SoakRequest]:
    """So many requests of all kinds."""
    rng = random.Random(f"faults:{seed}")
    return [make_request(rng, _KINDS[i % len(_KINDS)]) for i in range(size)]


async def undisturbed(asker: Asker, pool: list[SoakRequest]) -> list[Answer]:
    """The answer to each request of the pool, asked alone, and then once more through the next proxy.

    Raises:
        AssertionError: one fails, or two proxies differ: then nothing could be told.
    """
    answers = []
    for index, request in enumerate(pool):
        first = await asker.answer(request, first=index)
        again = await asker.answer(request, first=index + 1)
        assert first == again, f"two answers to one request alone ({request.kind}): {first} and {again}"
        answers.append(first)
    check_pool(answers)
    return answers


@dataclass
class Traffic:
    """Requests at a steady rate, whether or not earlier ones are answered: a slow server gets no fewer of them.

    Args:
        asker: who asks.
        pool: what is asked, in shuffled rounds, each with its right answer.
        rate: requests a second.
    """

    asker: Asker
    pool: list[tuple[SoakRequest, Answer]]
    rate: float
    seed: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    _asking: set[asyncio.Task[None]] = field(default_factory=set)
    _source: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._source = asyncio.create_task(self._arrivals(), name="arrivals")

    async def stop(self) -> None:
        """No new requests; wait for the answers to those under way, each of which has its own deadline."""
        assert self._source is not None
        self._source.cancel()
        await asyncio.gather(self._source, return_exceptions=True)
        await asyncio.gather(*self._asking)

    async def settle(self, timeout_s: float) -> None:
        """Wait until the requests that are under way now are answered; new ones go on arriving."""
        if under_way := set(self._asking):
            await asyncio.wait(under_way, timeout=timeout_s)

    async def _arrivals(self) -> None:
        rng = random.Random(f"arrivals:{self.seed}")
        begin, count = time.monotonic(), 0
        while True:
            for request, expected in rng.sample(self.pool, len(self.pool)):
                await asyncio.sleep(max(0.0, begin + count / self.rate - time.monotonic()))
                self._send(request, expected, stream=request.kind == LONG or rng.random() < 0.5, first=count)
                count += 1

    def _send(
        self,
        request: SoakRequest,
        expected: Answer,
        *,
        stream: bool,
        first: int,
        is_extra: bool = False,
        on_piece: Callable[[bytes], None] = ignore,
    ) -> None:
        asking = asyncio.create_task(self._ask(request, expected, stream, first, is_extra, on_piece))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)

    async def fill_streams(self, count: int) -> None:
        """Streams on top of the steady ones, begun and far from their end on return: work for a fault to hit."""
        long = [(request, answer) for request, answer in self.pool if request.kind == LONG]
        begun = [asyncio.Event() for _ in range(count)]
        for index, event in enumerate(begun):
            request, expected = long[index % len(long)]
            self._send(request, expected, stream=True, first=index, is_extra=True, on_piece=_setter(event))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FILL_TIMEOUT_S):
                await asyncio.gather(*(event.wait() for event in begun))

    async def _ask(
        self,
        request: SoakRequest,
        expected: Answer,
        stream: bool,
        first: int,
        is_extra: bool,
        on_piece: Callable[[bytes], None],
    ) -> None:
        outcome = await self.asker.ask(request, expected, stream=stream, first=first, on_piece=on_piece)
        outcome.is_extra = is_extra
        self.outcomes.append(outcome)


def _setter(event: asyncio.Event) -> Callable[[bytes], None]:
    return lambda _: event.set()
