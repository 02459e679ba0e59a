"""Who is let in, over real sockets; strangers speak through sockets of their own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from epd import codec, gate
from epd.keys import ClusterKeys, new_key_file
from epd.messages import PROTOCOL_VERSION, Hello, Ping
from epd.transport import Dealer, HandshakeFailed, Router
from tests.tcp import TcpServer, connected

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""ZMTP 3.0 (https://rfc.zeromq.org/spec/23/), without security, as a client."""


def ready(**properties: bytes) -> bytes:
    """The command that ends the handshake."""
    pairs = {"Socket-Type": b"DEALER"} | properties
    body = b"\x05READY" + b"".join(
        bytes([len(name)]) + name.encode() + len(value).to_bytes(4, "big") + value for name, value in pairs.items()
    )
    return b"\x04" + bytes([len(body)]) + body


@pytest.fixture
def keys() -> Iterator[ClusterKeys]:
    """Of this process from now on."""
    keys = ClusterKeys(*zmq.curve_keypair())
    gate.use_cluster_keys(keys)
    yield keys
    gate.use_cluster_keys(None)


@pytest.fixture(params=["ipc", "tcp"])
async def router(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Router]:
    address = str(tmp_path / "worker") if request.param == "ipc" else "127.0.0.1:0"
    with contextlib.closing(Router(address, any_port=True)) as router:
        router.bind()
        yield router


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def check_it_serves(router: Router) -> None:
    with contextlib.closing(Dealer(router.address)) as dealer:
        dealer.connect()
        await dealer.send(Ping(sequence=7))
        async with asyncio.timeout(10):
            peer, message, _ = await router.receive()
            assert message == Ping(sequence=7)
            await router.send(peer, Ping(sequence=8))
            assert (await dealer.receive())[0] == Ping(sequence=8)


@contextlib.contextmanager
def stranger(address: str, **options: bytes) -> Iterator[zmq.Socket[bytes]]:
    """A client with keys of its own, or none, that sends a good message at once."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        for name, value in options.items():
            setattr(socket, name, value)
        socket.connect(address)
        socket.send_multipart(codec.encode(Ping(sequence=1)))
        yield socket


def stranger_keys(server: bytes) -> dict[str, bytes]:
    public, secret = zmq.curve_keypair()
    return {"curve_publickey": public, "curve_secretkey": secret, "curve_serverkey": server}


async def refuses(router: Router, **options: bytes) -> None:
    """Nothing of the stranger's arrives, and it is counted."""
    receiving = asyncio.create_task(router.receive())
    with stranger(router.address, **options):
        await until(lambda: router.refused > 0)
    assert not receiving.done()
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)


async def test_members_talk(keys: ClusterKeys, router: Router) -> None:
    await check_it_serves(router)
    assert router.refused == 0


async def test_nobody_without_keys(keys: ClusterKeys, router: Router) -> None:
    await refuses(router)
    await check_it_serves(router)


async def test_nobody_with_the_keys_of_another_cluster(keys: ClusterKeys, router: Router) -> None:
    await refuses(router, **stranger_keys(server=zmq.curve_keypair()[0]))
    await check_it_serves(router)


async def test_nobody_who_knows_only_the_public_key(keys: ClusterKeys, router: Router) -> None:
    await refuses(router, **stranger_keys(server=keys.public))
    await check_it_serves(router)


async def test_what_is_said_is_not_readable(keys: ClusterKeys) -> None:
    """A relay in the middle records the bytes, then replays them from a connection of its own."""
    with contextlib.closing(Router("127.0.0.1:0", any_port=True)) as router:
        router.bind()
        recorded = bytearray()
        async with TcpServer(lambda reader, writer: pass_on(reader, writer, router.address, recorded)) as relay:
            with contextlib.closing(Dealer(f"127.0.0.1:{relay.port}")) as dealer:
                dealer.connect()
                hello = Hello(protocol_version=PROTOCOL_VERSION, sender="the sender's name", model="m")
                await dealer.send(hello)
                assert (await asyncio.wait_for(router.receive(), 10))[1] == hello
        assert b"CURVE" in recorded
        assert b"the sender's name" not in recorded
        receiving = asyncio.create_task(router.receive())
        await send_raw(router, bytes(recorded))
        await until(lambda: router.refused == 1)
        assert not receiving.done()
        receiving.cancel()


async def pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, recorded: bytearray
) -> None:
    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, record: bytearray | None) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if record is not None:
                    record += data
                sink.write(data)
        sink.close()

    async with connected(port_of(address)) as (there, back):
        await asyncio.gather(copy(reader, back, recorded), copy(there, writer, None))


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@contextlib.asynccontextmanager
async def shaken_hands(router: Router, **properties: bytes) -> AsyncIterator[Streams]:
    """A connection on which messages may follow: libzmq takes none before it has sent its own READY."""
    async with connected(port_of(router.address)) as (reader, writer):
        writer.write(GREETING + ready(**properties))
        async with asyncio.timeout(10):
            await reader.readexactly(len(GREETING))
            _, size = await reader.readexactly(2)
            await reader.readexactly(size)
        yield reader, writer


async def send_raw(router: Router, data: bytes) -> None:
    """Send bytes, then read until the other side hangs up."""
    async with connected(port_of(router.address)) as streams:
        await send_until_cut(*streams, data)


async def send_until_cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(10):
            await reader.read()


@pytest.fixture
async def tcp_router() -> AsyncIterator[Router]:
    with contextlib.closing(Router("127.0.0.1:0", any_port=True)) as router:
        router.bind()
        yield router


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 100, GREETING + b"\x04\x03\x05WHAT"],
    ids=["noise", "another command"],
)
async def test_garbage_is_turned_away_and_named_once(
    tcp_router: Router, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    for count in (1, 2, 3):
        await send_raw(tcp_router, data)
        await until(lambda: tcp_router.refused == count)  # noqa: B023  # awaited here
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "away" in r.getMessage()]
    # A connection that has ended before it is looked at has no name any more: those share one line.
    assert 1 <= len(warnings) <= 2
    assert len({"somebody" in warning for warning in warnings}) == len(warnings)
    await check_it_serves(tcp_router)


async def test_a_browser_is_turned_away(keys: ClusterKeys, tcp_router: Router) -> None:
    """Without keys what it says is taken for the oldest ZMTP, which begins with a length: a malformed message."""
    await send_raw(tcp_router, b"GET / HTTP/1.1\r\nHost: worker\r\nUser-Agent: browser\r\n\r\n")
    await until(lambda: tcp_router.refused == 1)
    await check_it_serves(tcp_router)


@pytest.mark.parametrize("size", [codec.MAX_BUFFER_BYTES + 1024, 1 << 62])
async def test_an_oversized_frame_costs_its_connection_before_it_is_read(tcp_router: Router, size: int) -> None:
    with contextlib.closing(Dealer(tcp_router.address)) as other:
        other.connect()
        await other.send(Ping(sequence=1))
        await tcp_router.receive()
        async with shaken_hands(tcp_router) as streams:
            await send_until_cut(*streams, b"\x02" + size.to_bytes(8, "big") + bytes(1000))
        await until(lambda: tcp_router.refused == 1)
        await other.send(Ping(sequence=2))  # nobody else's connection is touched
        assert (await tcp_router.receive())[1] == Ping(sequence=2)


async def test_a_replayed_greeting_opens_a_connection_of_its_own_and_disturbs_nobody(tcp_router: Router) -> None:
    """Without keys whoever has recorded a greeting can send it again, and can say that it is the first sender."""
    with contextlib.closing(Dealer(tcp_router.address)) as dealer:
        dealer.connect()
        hello = Hello(protocol_version=PROTOCOL_VERSION, sender="proxy", model="m")
        await dealer.send(hello)
        first, _, _ = await tcp_router.receive()
        [header] = codec.encode(hello)
        replay = bytes([0, len(header)]) + bytes(header)
        async with shaken_hands(tcp_router) as (_, honest), shaken_hands(tcp_router, Identity=first) as (_, liar):
            liar.write(replay)
            honest.write(replay)
            second, message, _ = await asyncio.wait_for(tcp_router.receive(), 10)
            assert message == hello
            assert second != first
            await tcp_router.send(first, Ping(sequence=1))
            assert (await asyncio.wait_for(dealer.receive(), 10))[0] == Ping(sequence=1)
            await dealer.send(Ping(sequence=2))
            peer, message, _ = await asyncio.wait_for(tcp_router.receive(), 10)
            assert (peer, message) == (first, Ping(sequence=2))


async def test_peers_that_come_and_go_are_not_counted(router: Router) -> None:
    for _ in range(5):
        await check_it_serves(router)
    assert router.refused == 0


@pytest.mark.parametrize("with_keys", [True, False], ids=["only I have keys", "only it has keys"])
async def test_who_does_not_fit_is_told_what_to_look_at(with_keys: bool, tmp_path: Path) -> None:
    mine, theirs = (ClusterKeys(*zmq.curve_keypair()), None) if with_keys else (None, ClusterKeys(*zmq.curve_keypair()))
    await check_refusal_names_the_flag(mine, theirs, tmp_path)


async def test_other_keys_too(tmp_path: Path) -> None:
    await check_refusal_names_the_flag(ClusterKeys(*zmq.curve_keypair()), ClusterKeys(*zmq.curve_keypair()), tmp_path)


async def check_refusal_names_the_flag(mine: ClusterKeys | None, theirs: ClusterKeys | None, folder: Path) -> None:
    try:
        gate.use_cluster_keys(theirs)
        with contextlib.closing(Router(str(folder / "worker"))) as router:
            router.bind()
            gate.use_cluster_keys(mine)
            with contextlib.closing(Dealer(router.address)) as dealer:
                dealer.connect()
                with pytest.raises(HandshakeFailed, match="--cluster-keys"):
                    await dealer.send(Ping(sequence=1), timeout_s=10)
                with pytest.raises(HandshakeFailed, match="--cluster-keys"):
                    await asyncio.wait_for(dealer.receive(), 10)
    finally:
        gate.use_cluster_keys(None)


async def test_without_keys_a_public_address_warns(caplog: pytest.LogCaptureFixture, keys: ClusterKeys) -> None:
    with contextlib.closing(Router("*:0", any_port=True)) as router:
        router.bind()
        assert not caplog.records
    gate.use_cluster_keys(None)
    with contextlib.closing(Router("*:0", any_port=True)) as router:
        router.bind()
        assert "--cluster-keys" in caplog.text
        assert router.address.startswith("tcp://*:")
        assert not router.address.endswith(":0")


def test_a_process_with_keys_ends(tmp_path: Path) -> None:
    """Also while the thread that looks at keys waits for the next one."""
    new_key_file(tmp_path / "keys")
    program = f"""
import asyncio
from pathlib import Path
from epd import gate
from epd.keys import load_keys
from epd.transport import Router
gate.use_cluster_keys(load_keys(Path({str(tmp_path / "keys")!r})))
async def main():
    router = Router("127.0.0.1:0", any_port=True)
    router.bind()
    router.close()
asyncio.run(main())
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"ended\n"), done.stderr
