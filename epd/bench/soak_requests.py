"""A small pool of distinct requests whose answers are known, and one way of asking for each use of them."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import msgspec

from epd.bench.http_client import HttpClient
from epd.bench.words import make_text
from epd.bench.workload import data_url, make_jpeg
from epd.errors import ConfigError

PATH = "/chat/completions"
_PICTURE_SIZES = ((112, 112), (140, 84), (84, 140), (168, 112))
_NUM_PICTURES = 10
_KINDS = ("text", "text", "image", "image", "two images", "text, n=2", "image, n=2")


@dataclass(frozen=True)
class Sample:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


Answer = tuple[Sample, ...]


@dataclass(frozen=True)
class SoakRequest:
    """A request of the pool."""

    kind: str
    fields: dict[str, Any]

    def body(self, *, stream: bool) -> bytes:
        """The JSON to send."""
        return msgspec.json.encode(self.fields | {"stream": stream})


def make_pool(model: str, size: int, rng: random.Random, *, max_tokens: int) -> list[SoakRequest]:
    """So many distinct greedy requests of all kinds; pictures are shared among them."""
    urls = [data_url(make_jpeg(rng, rng.choice(_PICTURE_SIZES))) for _ in range(_NUM_PICTURES)]
    pool = []
    for index in range(size):
        kind = _KINDS[index % len(_KINDS)]
        count = {"image": 1, "image, n=2": 1, "two images": 2}.get(kind, 0)
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in rng.sample(urls, count)
        ]
        parts.append({"type": "text", "text": f"{make_text(rng, rng.randint(2, 24))}?"})
        fields: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": rng.randint(max_tokens // 4, max_tokens),
            "ignore_eos": rng.random() < 0.8,
            "return_token_ids": True,
        }
        if kind.endswith("n=2"):
            fields["n"] = 2
        pool.append(SoakRequest(kind, fields))
    return pool


class RequestFailed(Exception):
    """The server refused a request, or answered it with something else than an answer."""


class CutOff(RequestFailed):
    """A stream ended without its end, and without an error."""


async def ask(
    client: HttpClient, request: SoakRequest, *, stream: bool, leave_after: int | None = None, timeout_s: float = 120.0
) -> Answer | None:
    """Ask and read the answer.

    Args:
        client: for the cluster.
        request: what to ask.
        stream: as events or at once.
        leave_after: hang up when so many pieces of the answer have arrived; None: stay. A request that is not streamed
            has no pieces, and is left after so many turns of the event loop.
        timeout_s: for the whole.

    Returns:
        The samples by index; None when this client left.

    Raises:
        RequestFailed: no right answer came.
        ServerGone: the connection broke.
        TimeoutError: it took too long.
    """
    collector = Collector()
    sending = asyncio.ensure_future(client.request("POST", PATH, request.body(stream=stream), collector.feed))
    leaving: asyncio.Task[None] | None = None
    waited: set[asyncio.Future[Any]] = {sending}
    if leave_after is not None:
        leaving = asyncio.create_task(_leave(collector, leave_after, stream))
        waited.add(leaving)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if leaving is not None:
            leaving.cancel()
        if not sending.done():
            sending.cancel()
            await asyncio.wait({sending})
    if sending.cancelled():
        return None
    status = sending.result()
    if status != 200:
        raise RequestFailed(f"status {status}: {collector.text()[:200]}")
    return collector.streamed() if stream else collector.whole()


async def _leave(collector: Collector, after: int, stream: bool) -> None:
    if stream:
        while collector.pieces < after:
            await collector.news.wait()
            collector.news.clear()
        return
    for _ in range(20 * after):
        await asyncio.sleep(0)


class Collector:
    """The pieces of one answer's body, and what they come to."""

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self.pieces = 0
        self.news = asyncio.Event()

    def feed(self, data: bytes) -> None:
        """Take the next piece."""
        self._data.append(data)
        self.pieces += 1
        self.news.set()

    def text(self) -> str:
        """All of it, as it came."""
        return b"".join(self._data).decode(errors="replace")

    def whole(self) -> Answer:
        """The answer that came at once. Raises RequestFailed: it is none."""
        try:
            body = msgspec.json.decode(b"".join(self._data))
            choices = sorted(body["choices"], key=lambda choice: choice["index"])
            return tuple(
                Sample(choice["message"]["content"] or "", tuple(choice["token_ids"]), choice["finish_reason"])
                for choice in choices
            )
        except (msgspec.DecodeError, LookupError, TypeError) as error:
            raise RequestFailed(f"no answer: {error!r} in {self.text()[:200]}") from error

    def streamed(self) -> Answer:
        """The answer that came as events. Raises RequestFailed: an error came, or the stream was cut off."""
        texts: dict[int, str] = {}
        tokens: dict[int, list[int]] = {}
        reasons: dict[int, str] = {}
        *lines, rest = b"".join(self._data).split(b"\n")
        payloads = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        is_whole = bool(payloads) and payloads[-1] == b"[DONE]" and not rest
        for payload in payloads[: len(payloads) - is_whole]:
            event = msgspec.json.decode(payload)
            if event.get("error"):
                raise RequestFailed(f"error in the stream: {event['error']}")
            for choice in event["choices"]:
                index = choice["index"]
                texts[index] = texts.get(index, "") + (choice["delta"].get("content") or "")
                tokens.setdefault(index, []).extend(choice.get("token_ids") or ())
                if choice.get("finish_reason"):
                    reasons[index] = choice["finish_reason"]
        if not is_whole:
            raise CutOff(f"the stream was cut off: {self.text()[-200:]}")
        return tuple(Sample(texts[i], tuple(tokens[i]), reasons.get(i)) for i in sorted(texts))


def check_pool(answers: list[Answer]) -> None:
    """Refuse a pool whose answers could be swapped without anybody's noticing.

    Raises:
        ConfigError: fewer than half of the answers differ.
    """
    if len(set(answers)) * 2 < len(answers):
        raise ConfigError(f"only {len(set(answers))} of {len(answers)} expected answers differ: nothing could be told")
