from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from epd import transport
from epd.errors import ConfigError, ProtocolError
from epd.messages import Ping
from epd.transport import Dealer, PeerGone, Router, endpoint, endpoints


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/tmp/encoder_0", "ipc:///tmp/encoder_0"),
        ("ipc:///tmp/x", "ipc:///tmp/x"),
        ("10.0.0.2:7001", "tcp://10.0.0.2:7001"),
        ("tcp://host:7001", "tcp://host:7001"),
        ("[::1]:7001", "tcp://[::1]:7001"),
        (" localhost:1 ", "tcp://localhost:1"),
    ],
)
def test_addresses(address: str, expected: str) -> None:
    assert endpoint(address) == expected


@pytest.mark.parametrize(
    "address", ["", "host", "host:port", "http://host:1", "tcp://host", "host:99999", "host:0", "/" + "x" * 120]
)
def test_wrong_addresses_are_refused_with_the_forms_that_work(address: str) -> None:
    with pytest.raises(ConfigError, match=r"use a path|at most"):
        endpoint(address)


def test_lists_of_words_and_commas() -> None:
    assert endpoints(["/tmp/a,/tmp/b", "/tmp/c", "/tmp/a"]) == ("ipc:///tmp/a", "ipc:///tmp/b", "ipc:///tmp/c")


@pytest.fixture(params=["ipc", "tcp", "tcp6"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "ipc":
        return str(tmp_path / "worker")
    host = "127.0.0.1" if request.param == "tcp" else "[::1]"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as probe:
        probe.setsockopt(zmq.IPV6, 1)
        return f"{host}:{probe.bind_to_random_port(f'tcp://{host}')}"


@pytest.fixture
def router(address: str) -> Iterator[Router]:
    with contextlib.closing(Router(address)) as router:
        yield router


async def connect(address: str) -> Dealer:
    dealer = Dealer(address)
    dealer.connect()
    return dealer


async def test_question_and_answer(router: Router, address: str) -> None:
    router.bind()
    with contextlib.closing(await connect(address)) as dealer:
        await dealer.send(Ping(sequence=1))
        peer, message, _ = await router.receive()
        assert message == Ping(sequence=1)
        await router.send(peer, Ping(sequence=2))
        assert await dealer.receive() == (Ping(sequence=2), [])


async def test_what_comes_while_others_send_is_heard(router: Router, address: str) -> None:
    """Sending takes libzmq's signals too: whoever waits to receive must hear of them all the same."""
    router.bind()
    count = 2000

    async def answer() -> None:
        for _ in range(count):
            peer, message, _ = await router.receive()
            await router.send(peer, message)

    with contextlib.closing(await connect(address)) as dealer:

        async def ask() -> None:
            for sequence in range(count):
                await dealer.send(Ping(sequence=sequence))
                if sequence % 7 == 0:
                    await asyncio.sleep(0)

        async def hear() -> list[int]:
            heard = []
            for _ in range(count):
                message, _ = await dealer.receive()
                assert isinstance(message, Ping)
                heard.append(message.sequence)
            return heard

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(answer())
            heard = group.create_task(hear())
            group.create_task(ask())
        assert heard.result() == list(range(count))


async def test_one_who_never_waits_lets_others_have_their_turn(router: Router, address: str) -> None:
    router.bind()
    with contextlib.closing(await connect(address)) as dealer:
        for sequence in range(500):
            await dealer.send(Ping(sequence=sequence))
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count_turns())
        await router.receive()  # all others are there, or follow without a pause
        before = turns
        for _ in range(499):
            await router.receive()
        counting.cancel()
        assert turns > before + 5


async def test_a_dealer_waits_for_a_router_that_comes_later(router: Router, address: str) -> None:
    with contextlib.closing(await connect(address)) as dealer:
        sending = asyncio.create_task(dealer.send(Ping(sequence=1)))
        await asyncio.sleep(0)
        router.bind()
        await sending
        assert (await router.receive())[1] == Ping(sequence=1)


async def test_answers_sent_before_the_router_went_are_delivered_then_peer_gone(router: Router, address: str) -> None:
    router.bind()
    with contextlib.closing(await connect(address)) as dealer:
        await dealer.send(Ping(sequence=1))
        peer, _, _ = await router.receive()
        await router.send(peer, Ping(sequence=2))
        router.close()
        assert await dealer.receive() == (Ping(sequence=2), [])
        with pytest.raises(PeerGone):
            await dealer.receive()
        with pytest.raises(PeerGone):
            await dealer.send(Ping(sequence=3))


async def test_a_router_notices_that_a_dealer_has_gone(router: Router, address: str) -> None:
    router.bind()
    dealer = await connect(address)
    await dealer.send(Ping(sequence=1))
    peer, _, _ = await router.receive()
    dealer.close()

    async def answer_until_refused() -> None:
        while True:
            await router.send(peer, Ping(sequence=2))
            await asyncio.sleep(0)

    with pytest.raises(PeerGone):
        await asyncio.wait_for(answer_until_refused(), 10)


async def test_nobody_listens(tmp_path: Path) -> None:
    with contextlib.closing(await connect(str(tmp_path / "nobody"))) as dealer, pytest.raises(PeerGone):
        await dealer.send(Ping(sequence=1), timeout_s=0.05)


async def send_many(router: Router, peer: bytes) -> None:
    for sequence in range(100_000):
        await router.send(peer, Ping(sequence=sequence))


async def test_a_peer_that_does_not_read_stops_the_sender_not_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transport, "HIGH_WATER_MARK", 2)
    monkeypatch.setattr(transport, "SEND_TIMEOUT_S", 0.05)
    router = Router(str(tmp_path / "worker"))
    router.bind()
    with contextlib.closing(router), contextlib.closing(await connect(str(tmp_path / "worker"))) as dealer:
        await dealer.send(Ping(sequence=0))
        peer, _, _ = await router.receive()
        flood = send_many(router, peer)
        with pytest.raises(PeerGone, match="took no message"):
            await flood


async def test_what_is_posted_keeps_its_place_before_what_is_sent(router: Router, address: str) -> None:
    router.bind()
    with contextlib.closing(await connect(address)) as dealer:
        await dealer.send(Ping(sequence=0))
        for sequence in (1, 2):
            dealer.post(Ping(sequence=sequence))
        await dealer.send(Ping(sequence=3))
        dealer.post(Ping(sequence=4))
        async with asyncio.timeout(10):
            heard = [(await router.receive())[1] for _ in range(5)]
    assert heard == [Ping(sequence=sequence) for sequence in range(5)]


async def test_posts_that_find_no_room_go_when_there_is_some(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transport, "HIGH_WATER_MARK", 2)
    with contextlib.closing(Router(str(tmp_path / "worker"))) as router:
        router.bind()
        with contextlib.closing(await connect(str(tmp_path / "worker"))) as dealer:
            await dealer.send(Ping(sequence=0))
            for sequence in range(1, 3000):
                dealer.post(Ping(sequence=sequence))
            async with asyncio.timeout(30):
                heard = [(await router.receive())[1] for _ in range(3000)]
    assert heard == [Ping(sequence=sequence) for sequence in range(3000)]


async def test_a_peer_that_takes_no_posts_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transport, "HIGH_WATER_MARK", 2)
    monkeypatch.setattr(transport, "SEND_TIMEOUT_S", 0.05)
    with contextlib.closing(Router(str(tmp_path / "worker"))) as router:
        router.bind()
        with contextlib.closing(await connect(str(tmp_path / "worker"))) as dealer:
            await dealer.send(Ping(sequence=0))
            await router.receive()
            for sequence in range(100_000):
                dealer.post(Ping(sequence=sequence))
            with pytest.raises(PeerGone, match="took no message"):
                await asyncio.wait_for(dealer.receive(), 10)


async def test_malformed_messages_cost_only_themselves(router: Router, address: str) -> None:
    router.bind()
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.setsockopt(zmq.IPV6, 1)
        stranger.connect(endpoint(address))
        await stranger.send_multipart([b"\x00garbage", b"more"])
        with pytest.raises(ProtocolError):
            await router.receive()
        await stranger.send(b"")
        with pytest.raises(ProtocolError):
            await router.receive()
    with contextlib.closing(await connect(address)) as dealer:
        await dealer.send(Ping(sequence=1))
        assert (await router.receive())[1] == Ping(sequence=1)


async def test_an_address_in_use_is_refused_and_left_alone(router: Router, address: str) -> None:
    router.bind()
    with contextlib.closing(Router(address)) as second, pytest.raises(ConfigError, match="can't listen on"):
        second.bind()
    with contextlib.closing(await connect(address)) as dealer:
        await dealer.send(Ping(sequence=1))
        assert (await router.receive())[1] == Ping(sequence=1)


async def test_a_socket_file_left_by_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    import socket

    path = str(tmp_path / "worker")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with contextlib.closing(Router(path)) as router:
        router.bind()
        with contextlib.closing(await connect(path)) as dealer:
            await dealer.send(Ping(sequence=1))
            assert (await router.receive())[1] == Ping(sequence=1)
