"""The fault suite must see what it looks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from epd.bench.soak_requests import Sample, SoakRequest
from tests.epd.bench.fake_server import FakeServer
from tests.faults import asking
from tests.faults.asking import Asker, Outcome, Verdict, Wait
from tests.faults.figures import Moments, make_row
from tests.faults.relay import Relay
from tests.faults.report import table
from tests.faults.traffic import make_pool
from tests.ports import free_port
from tests.tcp import TcpServer, connected

REQUEST = SoakRequest("text", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6})
RIGHT = (Sample("xxxxxx", (), "length"),)


async def ask(
    *urls: str, expected: tuple[Sample, ...] = RIGHT, stream: bool = True, excused: frozenset[str] = frozenset()
) -> Outcome:
    return await Asker(urls, excused).ask(REQUEST, expected, stream=stream, first=0)


@pytest.mark.parametrize("stream", [True, False])
async def test_right_and_wrong_answers(stream: bool) -> None:
    async with FakeServer() as server:
        assert (await ask(server.base_url, stream=stream)).verdict is Verdict.RIGHT
        for wrong in (Sample("xxxxx", (), "length"), Sample("xxxxxx", (1,), "length"), Sample("xxxxxx", (), "stop")):
            outcome = await ask(server.base_url, expected=(wrong,), stream=stream)
            assert outcome.verdict is Verdict.LOST
            assert "another answer" in outcome.reason


PIECE = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'


@pytest.mark.parametrize(
    ("failure", "verdict"),
    [
        (PIECE, Verdict.LOST),  # the connection breaks in the middle
        (500, Verdict.FAILED),
        (503, Verdict.FAILED),  # no Retry-After
    ],
)
async def test_how_requests_end(failure: int | bytes, verdict: Verdict) -> None:
    async with FakeServer(fail=lambda _: failure) as server:
        assert (await ask(server.base_url)).verdict is verdict


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (PIECE + b'data: {"error":{"message":"no"}}\n\n', Verdict.FAILED),
        (PIECE + b'data: {"error":{"message":"no"}}\n\ndata: [DONE]\n\n', Verdict.FAILED),
        (PIECE, Verdict.LOST),
        (PIECE + b"data: [DONE]\n\n", Verdict.LOST),  # no finish reason
        (PIECE + b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n', Verdict.LOST),
        (
            PIECE + b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n',
            Verdict.RIGHT,
        ),
    ],
)
async def test_how_streams_end(body: bytes, verdict: Verdict) -> None:
    async with http_server(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body) as url:
        outcome = await ask(url, expected=(Sample("x", (), "length"),))
        assert outcome.verdict is verdict, outcome.reason


async def test_refusals_are_tried_again_elsewhere() -> None:
    busy = b"HTTP/1.1 429 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    async with FakeServer() as server, http_server(busy) as full, http_server(b"") as silent:
        outcome = await ask(nobody, full, silent, server.base_url)
    assert outcome.verdict is Verdict.RIGHT
    reasons = [reason for _, reason in outcome.refusals]
    assert [word in reason for word, reason in zip(("connect", "429", "closed"), reasons, strict=True)] == [True] * 3


async def test_a_break_in_the_middle_is_excused_only_of_a_killed_proxy() -> None:
    async with FakeServer(fail=lambda _: PIECE) as killed, FakeServer() as server:
        outcome = await ask(killed.base_url, server.base_url, excused=frozenset({killed.base_url}))
        assert (outcome.verdict, len(outcome.refusals)) == (Verdict.RIGHT, 1)
        assert (await ask(killed.base_url, server.base_url)).verdict is Verdict.LOST


async def test_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "HANG_S", 0.05)
    async with FakeServer(gather=1000) as server:
        outcome = await ask(server.base_url)
    assert outcome.verdict is Verdict.LOST
    assert "no news" in outcome.reason


@asynccontextmanager
async def http_server(answer: bytes) -> AsyncIterator[str]:
    """Gives every connection the same bytes, and closes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async with TcpServer(serve) as server:
        yield f"{server.url}/v1"


# -- figures -----------------------------------------------------------------------------------------------------------


def outcome(started: float, seconds: float, verdict: Verdict = Verdict.RIGHT, **fields: Any) -> Outcome:
    one = Outcome("text", False, started, verdict, started + seconds, "why", **fields)
    one.waits = one.waits or [Wait(one.ended, seconds)]
    return one


def test_figures_of_a_fault() -> None:
    quiet = [outcome(0.1 * i, 0.2) for i in range(50)]
    after = [
        outcome(9.9, 0.3),  # under way at the fault
        outcome(10.5, 2.0, refusals=[(10.6, "429")]),
        outcome(10.6, 0.1, Verdict.FAILED),
        outcome(10.7, 0.1, Verdict.LOST),
        outcome(14.0, 0.2),
        outcome(18.0, 9.0),  # after the watch
    ]
    row = make_row("x", quiet + after, Moments(fault=10, watched=17, counted_from=10))
    assert (row.requests, row.right, row.refused, row.num_failed, len(row.lost)) == (6, 4, 1, 1, 1)
    assert row.added_p50_ms == pytest.approx(100)
    assert row.recovery_s == pytest.approx(2.5), "until the last one that waited too long"
    assert row.longest_wait_s == pytest.approx(2.0)
    assert row.problems == []
    assert "| x | 6 | 66.7 % | 1 | 1 | 1 | 100 |" in table([row])


def test_a_quiet_phase_that_was_not_quiet_is_a_problem() -> None:
    row = make_row("x", [outcome(0, 1, Verdict.FAILED)], Moments(fault=10, watched=17, counted_from=10))
    assert "not quiet" in row.problems[0]


def test_requests_of_the_pool_are_the_same_for_a_seed() -> None:
    pool = make_pool(12, 1)
    assert pool == make_pool(12, 1)
    assert len({request.body(stream=True) for request in pool}) == 12


# -- the relay ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Relay, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to an echo, through a relay."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)

    async with (
        TcpServer(echo) as server,
        started(Relay(free_port(), server.port)) as relay,
        connected(relay.port) as (reader, writer),
    ):
        yield relay, reader, writer


@asynccontextmanager
async def started(relay: Relay) -> AsyncIterator[Relay]:
    await relay.start()
    try:
        yield relay
    finally:
        await relay.close()


async def test_relay_holds_back_while_it_is_cut_and_loses_nothing() -> None:
    async with relayed() as (relay, reader, writer):
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        relay.cut()
        writer.write(b"two")
        answer = asyncio.create_task(reader.readexactly(3))
        assert not (await asyncio.wait({answer}, timeout=0.1))[0]
        relay.heal()
        assert await answer == b"two"
        assert relay.last_seen(b"two") is not None
        assert relay.last_seen(b"three") is None


async def test_relay_delays_each_way() -> None:
    async with relayed() as (relay, reader, writer):
        relay.delay_s = 0.1
        begin = asyncio.get_running_loop().time()
        writer.write(b"x" * 300_000)
        await reader.readexactly(300_000)
        assert asyncio.get_running_loop().time() - begin >= 0.2


async def test_relay_closes_when_nobody_listens() -> None:
    async with started(Relay(free_port(), free_port())) as relay, connected(relay.port) as (reader, _):
        with suppress(ConnectionError):
            assert await reader.read() == b""
