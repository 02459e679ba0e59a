"""`epd bench proxy`: what the HTTP front adds, against bare FastAPI and uvicorn that send as much.

Behind the front stands a worker that answers at once, so all that is measured is the front: validation, chat template,
tokenizer, routing, sockets, detokenizer, the stream. Both sides get the same requests in turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from epd.bench.children import START_TIMEOUT_S, fake_pd, free_port, running
from epd.bench.http_client import HttpClient, ServerGone
from epd.bench.output import markdown_table, number
from epd.bench.words import make_text
from epd.checkpoint import fingerprint
from epd.config import ProxyConfig
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError

_PATH = "/chat/completions"
_MODEL = "bench"
_PROMPT_WORDS = 64


@dataclass(frozen=True, kw_only=True)
class ProxyBench:
    """What to measure."""

    model: Path = CHECKPOINT_DIR
    """Its tokenizer and chat template are used."""
    requests: int = 200
    """Of each side, for each row."""
    concurrency: int = 16
    output_tokens: int = 64
    rounds: int = 4

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for name in ("requests", "concurrency", "output_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: want at least 1")


@dataclass(frozen=True)
class ProxyFigures:
    """One kind of request; the front and the bare server."""

    name: str
    tokens: int
    """Of each answer; streamed if more than one."""
    front_ms: float
    """Median duration of a request, alone."""
    echo_ms: float
    front_per_s: float
    """Requests a second, many at once."""
    echo_per_s: float

    @property
    def added_ms(self) -> float:
        """By the front, for a request alone."""
        return self.front_ms - self.echo_ms


async def run_proxy_bench(bench: ProxyBench, notify: Callable[[str], None] = lambda _: None) -> list[ProxyFigures]:
    """Measure a request of one token, whole, and one of many, streamed.

    Raises:
        ConfigError: a server does not start, or refuses the requests.
    """
    async with _front(bench.model) as front, _echo() as echo:
        figures = []
        for name, tokens, stream in (("one token, at once", 1, False), ("streamed", bench.output_tokens, True)):
            notify(name)
            figures.append(await _measure(bench, front, echo, name, tokens, stream))
        return figures


@contextlib.asynccontextmanager
async def _front(model: Path) -> AsyncIterator[HttpClient]:
    ProxyConfig(model=model)  # says what is wrong with the folder
    with tempfile.TemporaryDirectory(prefix="epd-bench-") as folder:
        address, port = f"{folder}/pd", free_port()
        flags = ("--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--pd-addr-list", address)
        names = ("--served-model-name", _MODEL, "--log-level", "error")
        async with fake_pd(address, fingerprint(model)), running("epd", "proxy", *flags, *names):
            yield await _answering(port)


@contextlib.asynccontextmanager
async def _echo() -> AsyncIterator[HttpClient]:
    port = free_port()
    async with running("epd.bench.echo", str(port)):
        yield await _answering(port)


async def _answering(port: int) -> HttpClient:
    """A client for the server, once it answers."""
    client = HttpClient(f"http://127.0.0.1:{port}/v1")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ServerGone):
            if await client.request("POST", _PATH, _body("hello", 1, False)) == 200:
                return client
        await asyncio.sleep(0.05)
    raise ConfigError(f"a server for the comparison did not answer within {START_TIMEOUT_S:g} s")


def _body(text: str, tokens: int, stream: bool) -> bytes:
    return msgspec.json.encode(
        {
            "model": _MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": stream,
        }
    )


async def _measure(
    bench: ProxyBench, front: HttpClient, echo: HttpClient, name: str, tokens: int, stream: bool
) -> ProxyFigures:
    rng = random.Random(name)
    bodies = [_body(make_text(rng, _PROMPT_WORDS), tokens, stream) for _ in range(bench.requests)]
    share = max(1, bench.requests // bench.rounds)
    alone_ms: tuple[list[float], list[float]] = ([], [])
    busy_s = [0.0, 0.0]
    for round_number in range(bench.rounds):
        chosen = bodies[round_number * share : (round_number + 1) * share]
        for side, client in enumerate((front, echo)):
            alone_ms[side].extend([await _timed_ms(client, body) for body in chosen])
            busy_s[side] += await _many_s(client, chosen, bench.concurrency)
    total = share * bench.rounds
    front_ms, echo_ms = (statistics.median(times) for times in alone_ms)
    return ProxyFigures(name, tokens, front_ms, echo_ms, total / busy_s[0], total / busy_s[1])


async def _timed_ms(client: HttpClient, body: bytes) -> float:
    start = time.perf_counter()
    try:
        status = await client.request("POST", _PATH, body)
    except ServerGone as error:
        raise ConfigError(f"a server of the comparison broke: {error}") from error
    if status != 200:
        raise ConfigError(f"a server of the comparison answered {status}")
    return (time.perf_counter() - start) * 1000


async def _many_s(client: HttpClient, bodies: list[bytes], concurrency: int) -> float:
    waiting = iter(bodies)

    async def worker() -> None:
        for body in waiting:
            await _timed_ms(client, body)

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return time.perf_counter() - start


def format_proxy_figures(figures: list[ProxyFigures]) -> str:
    """A table in Markdown."""
    header = (
        "request", "tokens", "front, ms", "FastAPI, ms", "added, ms", "added a token, ms", "front, req/s",
        "FastAPI, req/s", "ratio",
    )  # fmt: skip
    rows = [
        [
            one.name,
            str(one.tokens),
            number(one.front_ms, 2),
            number(one.echo_ms, 2),
            number(one.added_ms, 2),
            number(one.added_ms / one.tokens, 3),
            number(one.front_per_s, 0),
            number(one.echo_per_s, 0),
            number(one.front_per_s / one.echo_per_s, 2),
        ]
        for one in figures
    ]
    return markdown_table(header, rows)
