"""`epd bench proxy`: what the HTTP front costs, against bare FastAPI and uvicorn that send as much.

Behind the front stand workers that compute nothing, so all that is measured is the front: validation, chat template,
tokenizer, routing, sockets, detokenizer, the stream. Both sides get the same requests in turns, after some that do not
count; each prompt is new. Rates *a core* are by the processor time of the server's own process: load generator and
worker may share its cores.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from epd.bench.fronts import Server, bare_fastapi, chat, front
from epd.bench.output import markdown_table, number
from epd.bench.proxy_streams import BodyFigures, StreamFigures, measure_large_body, measure_streams
from epd.bench.words import make_text
from epd.demo import CHECKPOINT_DIR

_PROMPT_WORDS = 64
_FEW_STREAMS = 64
_FEW_STEP_MS = 5.0
_MANY_STEP_MS = 50.0


@dataclass(frozen=True, kw_only=True)
class ProxyBench:
    """What to measure."""

    model: Path = CHECKPOINT_DIR
    """Its tokenizer and chat template are used."""
    requests: int = 1000
    """Of each side, for each row."""
    concurrency: int = 16
    output_tokens: int = 64
    rounds: int = 4
    streams: int = 1000
    """Open at once."""
    seconds: int = 20
    """For which they are."""
    body_mib: int = 60
    """Of the large body."""


@dataclass
class Side:
    """One server's part of a row."""

    alone_ms: list[float] = field(default_factory=list)
    """Durations of requests, one at a time."""
    busy_s: float = 0.0
    """That all requests took, many at once."""
    cpu_s: float = 0.0
    """Of the server for these."""
    worker_cpu_s: float = 0.0

    def quantile_ms(self, share: float) -> float:
        """Of requests alone."""
        ordered = sorted(self.alone_ms)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@dataclass(frozen=True)
class RequestFigures:
    """One kind of request; the front and the bare server."""

    name: str
    tokens: int
    """Of each answer; streamed if more than one."""
    requests: int
    front: Side
    bare: Side


@dataclass(frozen=True)
class ProxyFigures:
    """All that was measured."""

    requests: list[RequestFigures]
    streams: list[StreamFigures]
    body: BodyFigures


async def run_proxy_bench(bench: ProxyBench, notify: Callable[[str], None] = lambda _: None) -> ProxyFigures:
    """Measure requests of one token, and of many streamed; streams at an engine's pace; streams beside a large body.

    Raises:
        ConfigError: a server does not start, or refuses the requests.
    """
    requests, streams = [], []
    async with front(bench.model) as ours, bare_fastapi() as bare:
        for name, tokens, stream in (("one token, at once", 1, False), ("streamed", bench.output_tokens, True)):
            notify(name)
            requests.append(await _measure(bench, ours, bare, name, tokens, stream))
    async with front(bench.model, step_ms=_FEW_STEP_MS) as ours:
        notify(f"a body of {bench.body_mib} MiB")
        body = await measure_large_body(ours, bench.body_mib)
        few = min(bench.streams, _FEW_STREAMS)
        notify(f"{few} streams")
        streams.append(await measure_streams(ours, few, _FEW_STEP_MS, bench.seconds))
    async with front(bench.model, step_ms=_MANY_STEP_MS) as ours:
        notify(f"{bench.streams} streams")
        streams.append(await measure_streams(ours, bench.streams, _MANY_STEP_MS, bench.seconds))
    return ProxyFigures(requests, streams, body)


async def _measure(
    bench: ProxyBench, ours: Server, bare: Server, name: str, tokens: int, stream: bool
) -> RequestFigures:
    rng = random.Random(name)

    def bodies() -> list[bytes]:
        """No two of them with the same text."""
        return [chat(make_text(rng, _PROMPT_WORDS), tokens, stream=stream) for _ in range(share)]

    share = max(1, bench.requests // bench.rounds)
    sides = ((ours, Side()), (bare, Side()))
    for server, _ in sides:
        await _many_s(server, bodies(), bench.concurrency)  # its connections, and what Python makes at first use
    for _ in range(bench.rounds):
        alone, busy = bodies(), bodies()
        for server, side in sides:
            side.alone_ms.extend([await _timed_ms(server, body) for body in alone])
            cpu_s, worker_cpu_s = server.cpu_s(), server.worker_cpu_s()
            side.busy_s += await _many_s(server, busy, bench.concurrency)
            side.cpu_s += server.cpu_s() - cpu_s
            side.worker_cpu_s += server.worker_cpu_s() - worker_cpu_s
    return RequestFigures(name, tokens, share * bench.rounds, sides[0][1], sides[1][1])


async def _timed_ms(server: Server, body: bytes) -> float:
    start = time.perf_counter()
    await server.ask(body)
    return (time.perf_counter() - start) * 1000


async def _many_s(server: Server, bodies: list[bytes], concurrency: int) -> float:
    waiting = iter(bodies)

    async def worker() -> None:
        for body in waiting:
            await server.ask(body)

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return time.perf_counter() - start


# -- tables ------------------------------------------------------------------------------------------------------------


def format_proxy_figures(figures: ProxyFigures) -> str:
    """Tables in Markdown."""
    parts = [
        "Requests alone, milliseconds:",
        _latency_table(figures.requests),
        "Many requests at once:",
        _rate_table(figures.requests),
        "Streams at an engine's pace; memory is the proxy's, in MiB:",
        _stream_table(figures.streams),
        figures.body.describe(),
    ]
    return "\n\n".join(parts)


def _latency_table(figures: list[RequestFigures]) -> str:
    header = ("request", "tokens", "front p50", "p99", "FastAPI p50", "p99", "added p50", "added p99")
    rows = []
    for one in figures:
        times = [side.quantile_ms(share) for side in (one.front, one.bare) for share in (0.5, 0.99)]
        added = [times[0] - times[2], times[1] - times[3]]
        rows.append([one.name, str(one.tokens), *(number(time_ms, 2) for time_ms in (*times, *added))])
    return markdown_table(header, rows)


def _rate_table(figures: list[RequestFigures]) -> str:
    header = (
        "request", "tokens", "front, req/s", "FastAPI, req/s", "ratio", "front, CPU ms", "FastAPI, CPU ms", "ratio",
        "tokens/s a core", "worker, CPU ms",
    )  # fmt: skip
    return markdown_table(header, [_rate_row(one) for one in figures])


def _rate_row(one: RequestFigures) -> list[str]:
    front_cpu, bare_cpu = one.front.cpu_s / one.requests, one.bare.cpu_s / one.requests
    return [
        one.name,
        str(one.tokens),
        number(one.requests / one.front.busy_s, 0),
        number(one.requests / one.bare.busy_s, 0),
        number(one.bare.busy_s / one.front.busy_s, 2),
        number(front_cpu * 1000, 2),
        number(bare_cpu * 1000, 2),
        number(bare_cpu / front_cpu if front_cpu else None, 2),
        number(one.tokens / front_cpu if front_cpu else None, 0),
        number(one.front.worker_cpu_s / one.requests * 1000, 2),
    ]


def _stream_table(figures: list[StreamFigures]) -> str:
    header = (
        "streams", "step, ms", "tokens/s", "events a token", "CPU us a token", "tokens/s a core", "worker, cores",
        "before", "first quarter", "last quarter", "after",
    )  # fmt: skip
    rows = []
    for one in figures:
        per_token = one.cpu_s / one.tokens
        rates = [number(one.tokens / one.duration_s), number(one.events / one.tokens, 2), number(per_token * 1e6, 1)]
        cores = [number(1 / per_token if per_token else None), number(one.worker_cpu_s / one.duration_s, 2)]
        memory = [number(size / (1 << 20) if size is not None else None, 1) for size in one.memory_bytes]
        rows.append([str(one.streams), number(one.step_ms), *rates, *cores, *memory])
    return markdown_table(header, rows)
