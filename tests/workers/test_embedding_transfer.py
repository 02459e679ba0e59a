"""Transfers over a fake connection, and over real sockets to a stub of a PD."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epd.codec import Buffer
from epd.errors import ContextLengthExceeded, ErrorInfo, Overloaded, ProtocolError, WorkerFailed
from epd.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Embeddings,
    EmbeddingsReply,
    Hello,
    Load,
    Ping,
    Pong,
    Refusal,
    Welcome,
    WorkerInfo,
)
from epd.transport import PeerGone, Router
from epd.types import WorkerRole, WorkerState
from workers import embedding_transfer
from workers.embedding_cache import EncodedImage
from workers.embedding_transfer import MAX_IN_FLIGHT, EmbeddingTransfer

PD = "ipc:///tmp/pd"
IMAGE = EncodedImage((7,) * 4, (1, 4, 4), (4, 8), "bfloat16", memoryview(bytes(range(64))))
WELCOME = Welcome(
    protocol_version=PROTOCOL_VERSION,
    worker=WorkerInfo(role=WorkerRole.PREFILL_DECODE, address=PD, incarnation="1", model="m", dtype="bfloat16"),
)


class FakeConnection:
    """The other end of a connection, played by the test."""

    def __init__(self, address: str, greeting: AnyMessage | None = WELCOME) -> None:
        self.address = address
        self.sent: list[tuple[AnyMessage, list[Buffer]]] = []
        self.news = asyncio.Condition()
        self.incoming: asyncio.Queue[AnyMessage | Exception] = asyncio.Queue()
        self.closed = False
        self.greeting = greeting
        self.answers_pings = True

    def connect(self) -> None:
        pass

    async def receive(self) -> tuple[AnyMessage, list[memoryview]]:
        message = await self.incoming.get()
        if isinstance(message, Exception):
            raise message
        return message, []

    async def send(self, message: AnyMessage, *buffers: Buffer, timeout_s: float = 5.0) -> None:
        if self.closed:
            raise PeerGone("closed")
        async with self.news:
            self.sent.append((message, list(buffers)))
            self.news.notify_all()
        if isinstance(message, Hello) and self.greeting is not None:
            self.incoming.put_nowait(self.greeting)
        if isinstance(message, Ping) and self.answers_pings:
            pong = Pong(sequence=message.sequence, incarnation="1", state=WorkerState.READY, load=Load())
            self.incoming.put_nowait(pong)

    def close(self) -> None:
        self.closed = True

    def shipped(self) -> list[str]:
        return [message.content_key for message, _ in self.sent if isinstance(message, Embeddings)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self.news:
            await self.news.wait_for(condition)

    async def has_shipped(self, key: str) -> None:
        await self.until(lambda: key in self.shipped())

    def reply(self, key: str, error: ErrorInfo | None = None) -> None:
        self.incoming.put_nowait(EmbeddingsReply(content_key=key, error=error))


class Pds:
    """Makes the fake connections and remembers them."""

    def __init__(self, greeting: AnyMessage | None = WELCOME) -> None:
        self.made: list[FakeConnection] = []
        self.greeting = greeting

    def __call__(self, address: str) -> FakeConnection:
        self.made.append(FakeConnection(address, self.greeting))
        return self.made[-1]


def transfer_to(pds: Pds, *addresses: str) -> EmbeddingTransfer:
    transfer = EmbeddingTransfer(sender="encoder_0", model="m", connect=pds)
    transfer.set_roster(b"proxy", addresses or (PD,))
    return transfer


async def test_embeddings_travel_raw_after_the_handshake() -> None:
    pds = Pds()
    transfer = transfer_to(pds)
    shipping = asyncio.create_task(transfer.ship(PD, "key", IMAGE))
    await asyncio.wait([shipping], timeout=0)
    connection = pds.made[0]
    await connection.until(lambda: connection.shipped() == ["key"])
    assert connection.sent[0][0] == Hello(protocol_version=PROTOCOL_VERSION, sender="encoder_0", model="m")
    header, buffers = next(sent for sent in connection.sent if isinstance(sent[0], Embeddings))
    assert header == Embeddings(
        content_key="key", token_ids=(7,) * 4, grid_thw=(1, 4, 4), shape=(4, 8), dtype="bfloat16"
    )
    assert buffers == [IMAGE.data]
    assert not shipping.done()
    connection.reply("key")
    await shipping
    await transfer.close()
    assert connection.closed


async def started(transfer: EmbeddingTransfer, pds: Pds, *keys: str) -> tuple[FakeConnection, list[asyncio.Task[None]]]:
    """Shipments that the PD has got but not answered."""
    tasks = [asyncio.create_task(transfer.ship(PD, key, IMAGE)) for key in keys]
    await asyncio.wait(tasks, timeout=0)
    connection = pds.made[-1]
    await connection.until(lambda: len(connection.shipped()) == min(len(set(keys)), MAX_IN_FLIGHT))
    return connection, tasks


async def test_several_are_in_flight_and_replies_may_come_in_any_order() -> None:
    pds = Pds()
    connection, tasks = await started(transfer_to(pds), pds, "a", "b", "c")
    for key, task in zip("cba", reversed(tasks), strict=True):
        connection.reply(key)
        await task
    assert len(pds.made) == 1


async def test_the_number_in_flight_is_bounded() -> None:
    pds = Pds()
    keys = [str(n) for n in range(MAX_IN_FLIGHT + 3)]
    connection, tasks = await started(transfer_to(pds), pds, *keys)
    assert connection.shipped() == keys[:MAX_IN_FLIGHT]
    connection.reply("0")
    await connection.until(lambda: len(connection.shipped()) == MAX_IN_FLIGHT + 1)
    for key in keys[1:]:
        await connection.has_shipped(key)
        connection.reply(key)
    await asyncio.gather(*tasks)


async def test_the_same_picture_to_the_same_pd_is_sent_once_while_it_is_under_way() -> None:
    pds = Pds()
    transfer = transfer_to(pds)
    connection, tasks = await started(transfer, pds, "a", "a", "a")
    tasks[0].cancel()  # giving up does not disturb the others
    connection.reply("a")
    await asyncio.gather(*tasks[1:])
    assert connection.shipped() == ["a"]
    again = asyncio.create_task(transfer.ship(PD, "a", IMAGE))
    await connection.until(lambda: connection.shipped() == ["a", "a"])
    connection.reply("a")
    await again


async def test_what_the_pd_says_against_a_picture_is_raised() -> None:
    pds = Pds()
    connection, (bad, good) = await started(transfer_to(pds), pds, "bad", "good")
    connection.reply("bad", ErrorInfo(code="context_length_exceeded", message="too long", param="messages"))
    connection.reply("good")
    with pytest.raises(ContextLengthExceeded, match="too long"):
        await bad
    await good


@pytest.mark.parametrize("stage", ["before the welcome", "in flight"])
async def test_a_pd_that_vanishes_fails_what_is_under_way_and_the_next_gets_a_new_connection(stage: str) -> None:
    pds = Pds(greeting=None if stage == "before the welcome" else WELCOME)
    transfer = transfer_to(pds)
    task = asyncio.create_task(transfer.ship(PD, "a", IMAGE))
    await asyncio.wait([task], timeout=0)
    connection = pds.made[0]
    await connection.until(lambda: bool(connection.sent if pds.greeting is None else connection.shipped()))
    connection.incoming.put_nowait(PeerGone("lost"))
    with pytest.raises(WorkerFailed, match="lost"):
        await task
    assert connection.closed
    pds.greeting = WELCOME
    connection, (again,) = await started(transfer, pds, "a")
    connection.reply("a")
    await again
    assert len(pds.made) == 2


@pytest.mark.parametrize(
    "greeting",
    [
        Refusal(protocol_version=PROTOCOL_VERSION, reason="checkpoint m, this worker serves n"),
        Welcome(protocol_version=PROTOCOL_VERSION + 1, worker=WELCOME.worker),
        PeerGone("lost"),
    ],
)
async def test_a_pd_that_does_not_match_gets_no_embeddings(greeting: Any) -> None:
    pds = Pds(greeting)
    with pytest.raises(WorkerFailed, match=r"checkpoint m|protocol version|lost"):
        await transfer_to(pds).ship(PD, "a", IMAGE)
    assert pds.made[0].shipped() == []
    assert pds.made[0].closed


async def test_malformed_late_and_unexpected_messages_disturb_nothing() -> None:
    pds = Pds()
    connection, (task,) = await started(transfer_to(pds), pds, "a")
    connection.incoming.put_nowait(ProtocolError("rubbish"))
    connection.reply("never sent")
    connection.incoming.put_nowait(Ping(sequence=1))
    connection.reply("a")
    await task
    connection.reply("a")


async def test_a_silent_pd_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_transfer, "PING_INTERVAL_S", 0)
    pds = Pds()
    transfer = transfer_to(pds)
    task = asyncio.create_task(transfer.ship(PD, "a", IMAGE))
    await asyncio.wait([task], timeout=0)
    pds.made[0].answers_pings = False
    with pytest.raises(WorkerFailed, match="pings went unanswered"):
        await task


async def test_a_pd_that_only_answers_pings_is_given_up_and_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_transfer, "REPLY_TIMEOUT_S", 0.01)
    pds = Pds()
    transfer = transfer_to(pds)
    with pytest.raises(WorkerFailed, match="did not answer within"):
        await transfer.ship(PD, "a", IMAGE)
    assert pds.made[0].closed
    monkeypatch.undo()
    connection, (task,) = await started(transfer, pds, "a")
    connection.reply("a")
    await task
    assert len(pds.made) == 2


async def test_only_addresses_in_a_living_proxys_roster_are_known() -> None:
    transfer = EmbeddingTransfer(sender="e", model="m", connect=Pds())
    assert not transfer.knows(PD)
    transfer.set_roster(b"one", [PD])
    transfer.set_roster(b"two", [PD, "ipc:///tmp/other"])
    transfer.set_roster(b"one", [])
    assert transfer.knows(PD)
    transfer.forget_roster(b"two")
    transfer.forget_roster(b"never seen")
    assert not transfer.knows(PD)
    assert not transfer.knows("ipc:///tmp/other")


async def test_a_pd_that_left_the_roster_gets_what_is_under_way_and_is_hung_up_on_then() -> None:
    pds = Pds()
    transfer = transfer_to(pds)
    connection, (task,) = await started(transfer, pds, "a")
    transfer.set_roster(b"proxy", [])
    assert not connection.closed
    connection.reply("a")
    await task
    assert connection.closed


async def test_closing_fails_what_is_under_way() -> None:
    pds = Pds()
    transfer = transfer_to(pds)
    _, tasks = await started(transfer, pds, "a", "b")
    await transfer.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, WorkerFailed) for result in results)


# -- real sockets --------------------------------------------------------------------------------------------------


async def stub_pd(router: Router, replies: int) -> list[tuple[Embeddings, bytes]]:
    """Welcomes, answers pings, takes so many pictures."""
    taken: list[tuple[Embeddings, bytes]] = []
    while len(taken) < replies:
        peer, message, buffers = await router.receive()
        match message:
            case Hello():
                await router.send(peer, WELCOME)
            case Ping(sequence=sequence):
                await router.send(peer, Pong(sequence=sequence, incarnation="1", state=WorkerState.READY, load=Load()))
            case Embeddings():
                taken.append((message, bytes(buffers[0])))
                await router.send(peer, EmbeddingsReply(content_key=message.content_key))
            case _:
                raise AssertionError(message)
    return taken


async def test_over_real_sockets(tmp_path: Path) -> None:
    router = Router(str(tmp_path / "pd"))
    router.bind()
    transfer = EmbeddingTransfer(sender="e", model="m")
    transfer.set_roster(b"proxy", [router.address])
    pd = asyncio.create_task(stub_pd(router, 2))
    async with asyncio.timeout(30):
        await asyncio.gather(*(transfer.ship(router.address, key, IMAGE) for key in "ab"))
        taken = await pd
    assert [(header.content_key, data) for header, data in taken] == [
        ("a", bytes(IMAGE.data)),
        ("b", bytes(IMAGE.data)),
    ]
    await transfer.close()
    router.close()


async def test_a_real_pd_that_dies_is_noticed_without_waiting_for_a_timeout(tmp_path: Path) -> None:
    router = Router(str(tmp_path / "pd"))
    router.bind()
    transfer = EmbeddingTransfer(sender="e", model="m")
    transfer.set_roster(b"proxy", [router.address])
    pd = asyncio.create_task(stub_pd(router, 1))
    async with asyncio.timeout(30):
        await transfer.ship(router.address, "a", IMAGE)
        await pd
        lost = asyncio.create_task(transfer.ship(router.address, "b", IMAGE))
        message: AnyMessage | None = None
        while not isinstance(message, Embeddings):
            _, message, _ = await router.receive()
        router.close()
        with pytest.raises(WorkerFailed, match="lost the connection"):
            await lost
    await transfer.close()


async def test_pictures_that_wait_for_one_pd_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that nobody waits for any more: an asker who gives up makes no room for the next."""
    monkeypatch.setattr(embedding_transfer, "MAX_UNDER_WAY", 3)
    transfer = transfer_to(Pds())
    given_up = [asyncio.create_task(transfer.ship(PD, f"key {number}", IMAGE)) for number in range(3)]
    await asyncio.wait(given_up, timeout=0)
    for task in given_up:
        task.cancel()
    with pytest.raises(Overloaded, match="3 images wait"):
        await asyncio.wait_for(transfer.ship(PD, "one more", IMAGE), 20)
    await transfer.close()
