"""Puts load on a server: a fixed number of requests at once, or arrivals at a fixed mean rate."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from epd.bench.http_client import HttpClient, ServerGone
from epd.bench.statistics import Record
from epd.bench.stream import AnswerReader
from epd.bench.workload import PlannedRequest
from epd.errors import ConfigError

CHAT_PATH = "/chat/completions"

Send = Callable[[PlannedRequest], Coroutine[Any, Any, Record]]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How requests follow each other: exactly one of the two is set."""

    concurrency: int | None = None
    """Closed loop: so many at once, each followed by the next."""
    rate: float | None = None
    """Open loop: a Poisson process of so many a second, however long answers take."""

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError("give either --concurrency or --rate")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"--concurrency {self.concurrency}: want at least 1")
        if self.rate is not None and not self.rate > 0:
            raise ConfigError(f"--rate {self.rate}: want more than 0 requests a second")

    def __str__(self) -> str:
        return f"{self.rate:g}/s" if self.rate is not None else str(self.concurrency)


@dataclass(frozen=True)
class LoadRun:
    """What a run gave."""

    records: list[Record]
    duration_s: float
    """From the first request to the last answer."""
    client_cores: float
    """CPU time of this process over `duration_s`."""


async def run_load(
    client: HttpClient,
    requests: Sequence[PlannedRequest],
    pace: Pace,
    *,
    timeout_s: float,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> LoadRun:
    """Send all requests and wait for their ends. A request that fails is a record with an error, never an exception.

    Args:
        client: for the server.
        requests: in the order of their sending.
        pace: how they follow each other.
        timeout_s: for each request, from its sending to its end.
        seed: of the arrival times.
        done: called at the end of each.
    """
    began, cpu = time.perf_counter(), time.process_time()

    async def send(request: PlannedRequest) -> Record:
        record = await _send(client, request, began, timeout_s)
        done()
        return record

    if pace.rate is not None:
        records = await _open_loop(requests, pace.rate, random.Random(f"arrivals:{seed}"), send)
    else:
        assert pace.concurrency is not None
        records = await _closed_loop(requests, pace.concurrency, send)
    duration_s = time.perf_counter() - began
    return LoadRun(records, duration_s, (time.process_time() - cpu) / duration_s)


async def _closed_loop(requests: Sequence[PlannedRequest], concurrency: int, send: Send) -> list[Record]:
    waiting = iter(requests)
    records: list[Record] = []

    async def worker() -> None:
        for request in waiting:
            records.append(await send(request))

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(requests)))))
    return records


async def _open_loop(requests: Sequence[PlannedRequest], rate: float, rng: random.Random, send: Send) -> list[Record]:
    loop = asyncio.get_running_loop()
    arrival = loop.time()
    tasks = []
    for request in requests:
        await asyncio.sleep(arrival - loop.time())
        tasks.append(asyncio.create_task(send(request)))
        arrival += rng.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def _send(client: HttpClient, request: PlannedRequest, began: float, timeout_s: float) -> Record:
    start_ms = (time.perf_counter() - began) * 1000
    reader = AnswerReader()
    try:
        async with asyncio.timeout(timeout_s):
            status = await client.request("POST", CHAT_PATH, request.body, reader.feed)
    except TimeoutError:
        return reader.record(request.kind, start_ms, error="timeout")
    except ServerGone:
        return reader.record(request.kind, start_ms, error="connection")
    return reader.record(request.kind, start_ms, status=status)
