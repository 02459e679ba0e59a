"""The runtime around a service that does nothing, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from epd import codec, transport
from epd.config import WorkerConfig
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError, ProtocolError
from epd.messages import (
    PROTOCOL_VERSION,
    Abort,
    Announcement,
    AnyMessage,
    Hello,
    Load,
    Peers,
    Ping,
    Pong,
    Refusal,
    StageStats,
    Welcome,
)
from epd.transport import Dealer, Router
from epd.types import WorkerRole, WorkerState
from workers import runtime as runtime_module
from workers.runtime import WorkerRuntime
from workers.stall_watch import Progress


class Service:
    def __init__(self) -> None:
        self.messages: list[AnyMessage] = []
        self.gone: list[bytes] = []
        self.may_drain = asyncio.Event()
        self.is_draining = asyncio.Event()
        self.is_hanging = False
        self.is_handed_over = False
        self.is_stopped = False

    def handle(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        if isinstance(message, Peers):
            raise ProtocolError("not for me")
        self.messages.append(message)

    def peer_gone(self, peer: bytes) -> None:
        self.gone.append(peer)

    async def drain(self) -> None:
        self.is_draining.set()
        await self.may_drain.wait()

    async def hand_over(self) -> None:
        self.is_handed_over = True

    async def stop(self) -> None:
        self.is_stopped = True

    def load(self) -> Load:
        return Load(running=3)

    def progress(self) -> Progress:
        return Progress(is_busy=self.is_hanging, steps=0)

    def stages(self) -> dict[str, StageStats]:
        return {"e2e": StageStats(count=1, total_ms=2.0)}

    def counters(self) -> dict[str, int]:
        return {"things": 5}


class Worker:
    """A runtime on its way."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.address = str(folder / "worker")
        fields: dict[str, Any] = {"model": CHECKPOINT_DIR, "worker_addr": self.address, "drain_timeout": 20.0} | config
        self.service = Service()
        self.runtime = WorkerRuntime(
            WorkerConfig(**fields),
            role=WorkerRole.ENCODER,
            model="m",
            dtype="float32",
        )
        self.exit_code = asyncio.create_task(self.runtime.run(self.service))

    async def connect(self) -> Dealer:
        dealer = Dealer(self.address)
        dealer.connect()
        return dealer

    async def end(self) -> int:
        self.service.may_drain.set()
        os.kill(os.getpid(), signal.SIGTERM)
        return await asyncio.wait_for(self.exit_code, 20)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    worker = Worker(tmp_path)
    with contextlib.closing(await worker.connect()) as dealer:  # listening: its signal handlers are in place
        await dealer.send(Ping(sequence=0))
        await dealer.receive()
    yield worker
    if not worker.exit_code.done():
        assert await worker.end() == 0
    assert worker.service.is_stopped


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {"protocol_version": PROTOCOL_VERSION, "sender": "test", "model": "m"} | changes
    return Hello(**fields)


async def test_hello_and_ping(worker: Worker) -> None:
    with contextlib.closing(await worker.connect()) as dealer:
        await dealer.send(hello())
        welcome, _ = await dealer.receive()
        assert isinstance(welcome, Welcome)
        assert (welcome.worker.role, welcome.worker.model) == (WorkerRole.ENCODER, "m")
        await dealer.send(Ping(sequence=9))
        pong, _ = await dealer.receive()
        assert isinstance(pong, Pong)
        assert (pong.sequence, pong.load.running, pong.state) == (9, 3, WorkerState.READY)
        assert pong.incarnation == welcome.worker.incarnation
        assert pong.stages["e2e"].count == 1
        assert pong.counters == {"things": 5, "malformed_messages": 0, "refused_connections": 0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"protocol_version": 999}, "protocol version 999"), ({"model": "other"}, "checkpoint other")],
)
async def test_peers_that_do_not_fit_are_refused_with_a_reason(
    worker: Worker, changes: dict[str, object], reason: str
) -> None:
    with contextlib.closing(await worker.connect()) as dealer:
        await dealer.send(hello(**changes))
        refusal, _ = await dealer.receive()
        assert isinstance(refusal, Refusal)
        assert reason in refusal.reason


async def test_strangers_and_garbage_cost_one_message_each(worker: Worker) -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(f"ipc://{worker.address}")
        await stranger.send_multipart([b"garbage", b"\x00" * 100])
        with contextlib.closing(await worker.connect()) as dealer:
            await dealer.send(Abort(request_ids=("before hello",)))
            refusal, _ = await dealer.receive()
            assert isinstance(refusal, Refusal)
            await dealer.send(hello())
            await dealer.receive()
            await dealer.send(Peers(pd_addresses=()))
            await dealer.send(Abort(request_ids=("after hello",)))
            malformed = 0
            while malformed < 3:
                await dealer.send(Ping(sequence=1))
                pong, _ = await dealer.receive()
                assert isinstance(pong, Pong)
                malformed = pong.counters["malformed_messages"]
    assert worker.service.messages == [Abort(request_ids=("after hello",))]


async def test_a_silent_peer_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime_module, "PEER_TIMEOUT_S", 0.05)
    worker = Worker(tmp_path)
    with contextlib.closing(await worker.connect()) as dealer:
        await dealer.send(hello())
        await dealer.receive()
        async with asyncio.timeout(20):
            while not worker.service.gone:
                await asyncio.sleep(0.01)
    assert await worker.end() == 0


async def test_a_peer_that_was_forgotten_is_told_to_connect_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runtime_module, "PEER_TIMEOUT_S", 0.05)
    worker = Worker(tmp_path)
    with contextlib.closing(await worker.connect()) as dealer:
        await dealer.send(hello())
        await dealer.receive()
        async with asyncio.timeout(20):
            while not worker.service.gone:
                await asyncio.sleep(0.01)
            await dealer.send(Abort(request_ids=("r",)))
            refusal, _ = await dealer.receive()
    assert isinstance(refusal, Refusal)
    assert "connect again" in refusal.reason
    assert await worker.end() == 0


async def test_a_peer_that_does_not_read_holds_nobody_up(worker: Worker) -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.linger = 0
        deaf.rcvhwm = 1
        deaf.rcvbuf = 1
        deaf.connect(f"ipc://{worker.address}")
        ping = codec.encode(Ping(sequence=1))
        for _ in range(20_000):
            await deaf.send_multipart(ping)
        with contextlib.closing(await worker.connect()) as dealer:
            started = time.monotonic()
            await dealer.send(Ping(sequence=2))
            await asyncio.wait_for(dealer.receive(), 20)
            assert time.monotonic() - started < 4


async def test_draining_goes_on_answering_pings(worker: Worker) -> None:
    with contextlib.closing(await worker.connect()) as dealer:
        await dealer.send(hello())
        await dealer.receive()
        os.kill(os.getpid(), signal.SIGTERM)
        told, _ = await dealer.receive()
        assert isinstance(told, Pong)
        assert (told.sequence, told.state) == (0, WorkerState.DRAINING), "it says so without being asked"
        assert worker.service.is_draining.is_set(), "refusing begins before anybody is told"
        await dealer.send(Ping(sequence=1))
        pong, _ = await dealer.receive()
        assert isinstance(pong, Pong)
        assert (pong.sequence, pong.state) == (1, WorkerState.DRAINING)
        worker.service.may_drain.set()
        assert await asyncio.wait_for(worker.exit_code, 20) == 0
        assert not worker.service.is_handed_over


async def test_work_that_hangs_is_told_in_pongs(tmp_path: Path) -> None:
    worker = Worker(tmp_path, stall_timeout=0.2)
    with contextlib.closing(await worker.connect()) as dealer:
        await dealer.send(hello())
        await dealer.receive()
        for is_hanging in (True, False):
            worker.service.is_hanging = is_hanging
            pong = None
            async with asyncio.timeout(20):
                while pong is None or pong.is_stuck is not is_hanging:
                    await dealer.send(Ping(sequence=1))
                    message, _ = await dealer.receive()
                    assert isinstance(message, Pong)
                    pong = message
            assert (pong.stalled_s > 0.2) is is_hanging
    assert await worker.end() == 0


async def test_a_second_signal_hands_over_at_once(worker: Worker) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(worker.service.is_draining.wait(), 20)
    assert not worker.service.is_handed_over
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(worker.exit_code, 20) == 0
    assert worker.service.is_handed_over


async def test_what_does_not_drain_in_time_is_handed_over(tmp_path: Path) -> None:
    worker = Worker(tmp_path, drain_timeout=0.01)
    with contextlib.closing(await worker.connect()) as dealer:
        await dealer.send(Ping(sequence=1))
        await dealer.receive()
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(worker.exit_code, 20) == 0
    assert worker.service.is_handed_over
    assert worker.service.is_stopped


async def test_a_service_that_fails_gives_its_exit_code(worker: Worker) -> None:
    worker.service.may_drain.set()
    worker.runtime.shut_down(exit_code=7)
    assert await asyncio.wait_for(worker.exit_code, 20) == 7


async def test_workers_announce_themselves_to_proxies_that_come_later(tmp_path: Path) -> None:
    proxy_address = str(tmp_path / "proxy")
    worker = Worker(tmp_path, proxy_addr=(proxy_address,))
    for _ in range(2):  # the second one is a proxy that restarted
        with contextlib.closing(Router(proxy_address)) as proxy:
            proxy.bind()
            _, message, _ = await asyncio.wait_for(proxy.receive(), 20)
            assert isinstance(message, Announcement)
            assert message.worker.address == f"ipc://{worker.address}"
    assert await worker.end() == 0


async def announced(folder: Path, **config: object) -> str:
    """The address that a worker with these flags tells a proxy."""
    proxy_address = str(folder / "proxy")
    with contextlib.closing(Router(proxy_address)) as proxy:
        proxy.bind()
        worker = Worker(folder, proxy_addr=(proxy_address,), **config)
        async with asyncio.timeout(10):
            _, message, _ = await proxy.receive()
        assert isinstance(message, Announcement)
        assert await worker.end() == 0
        return message.worker.address


async def test_all_interfaces_and_a_free_port_are_announced_as_what_others_can_dial(tmp_path: Path) -> None:
    address = await announced(tmp_path, worker_addr="*:0")
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    assert host not in ("*", "0.0.0.0", "[::]")
    assert int(port) > 0


async def test_what_the_user_wants_to_be_announced_is(tmp_path: Path) -> None:
    address = await announced(tmp_path, worker_addr="127.0.0.1:0", advertise_addr="worker-7.example:7001")
    assert address == "tcp://worker-7.example:7001"


async def test_a_free_port_is_refused_when_nobody_is_told_of_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        WorkerRuntime(
            WorkerConfig(model=CHECKPOINT_DIR, worker_addr="127.0.0.1:0"),
            role=WorkerRole.ENCODER,
            model="m",
            dtype="float32",
        )


async def test_strangers_who_only_ping_are_not_remembered(worker: Worker) -> None:
    for _ in range(5):
        with contextlib.closing(await worker.connect()) as dealer:
            await dealer.send(Ping(sequence=1))
            await dealer.receive()
    assert not worker.runtime._last_seen


async def test_more_peers_than_the_limit_are_refused_with_a_reason(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_module, "MAX_PEERS", 1)
    with contextlib.closing(await worker.connect()) as first, contextlib.closing(await worker.connect()) as second:
        for _ in range(2):  # greeting again is no new peer
            await first.send(hello())
            assert isinstance((await first.receive())[0], Welcome)
        await second.send(hello())
        refusal, _ = await second.receive()
        assert isinstance(refusal, Refusal)
        assert "1 proxies and encoders are connected" in refusal.reason


async def test_a_peer_that_leaves_its_answers_unread_is_treated_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "HIGH_WATER_MARK", 2)
    monkeypatch.setattr(runtime_module, "SEND_TIMEOUT_S", 600.0)
    monkeypatch.setattr(runtime_module, "PEER_TIMEOUT_S", 600.0)
    monkeypatch.setattr(runtime_module, "MAX_WAITING_SENDS", 3)
    worker = Worker(tmp_path)
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.linger, deaf.rcvhwm, deaf.rcvbuf = 0, 1, 1
        deaf.connect(f"ipc://{worker.address}")
        await deaf.send_multipart(codec.encode(hello()))
        await deaf.recv_multipart()
        peer = next(iter(worker.runtime._names))
        large = Refusal(protocol_version=PROTOCOL_VERSION, reason="x" * (1 << 20))
        sends = [asyncio.create_task(worker.runtime.send(peer, large)) for _ in range(40)]
        async with asyncio.timeout(20):
            while not worker.service.gone:
                await asyncio.wait(sends, timeout=0.01)
        assert worker.service.gone == [peer]
        for task in sends:
            task.cancel()
        await asyncio.wait(sends)
    assert await worker.end() == 0
