"""Heads of answers go out with their bodies, and never later than the event loop's next turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from proxy.connection import Connection

App = Callable[[Scope, Receive, Send], Awaitable[None]]
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Socket(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def resume_reading(self) -> None:
        pass


async def start(send: Send, length: int | None, **headers: str) -> None:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    pairs += [] if length is None else [(b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": pairs})


async def body(send: Send, words: bytes, *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": words, "more_body": more})


def connect(app: App) -> tuple[Connection, Socket]:
    connection, socket = Connection(uvicorn.Config(app, log_config=None), ServerState(), {}), Socket()
    connection.connection_made(socket)
    return connection, socket


async def all_of(connection: Connection) -> None:
    """Wait for the end of all requests."""
    await asyncio.gather(*connection.tasks)


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_a_short_answer_is_one_write(keep_alive: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 2)
        await body(send, b"hi")

    connection, socket = connect(app)
    request = GET if keep_alive else GET.replace(b"host: x", b"connection: close")
    connection.data_received(request)
    await all_of(connection)
    (answer,) = socket.written
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nhi")
    assert socket.closed is not keep_alive


async def test_pieces_of_a_stream_go_out_as_they_come() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, None)
        for words in (b"one", b"HTTP/1.1 2", b""):
            await body(send, words, more=bool(words))

    connection, socket = connect(app)
    connection.data_received(GET)
    await all_of(connection)
    first, *others = socket.written
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\n3\r\none\r\n")
    assert others == [b"a\r\nHTTP/1.1 2\r\n", b"0\r\n\r\n"]


async def test_a_head_does_not_wait_for_a_body_that_comes_later() -> None:
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 2)
        await go_on.wait()
        await body(send, b"hi")

    connection, socket = connect(app)
    connection.data_received(GET)
    async with asyncio.timeout(5):
        while not socket.written:
            await asyncio.sleep(0)
    assert socket.written[0].endswith(b"\r\n\r\n")
    go_on.set()
    await all_of(connection)
    assert socket.written[1:] == [b"hi"]


async def test_a_head_without_a_body_goes_out_before_the_end() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 2, connection="close")
        await body(send, b"hi")

    connection, socket = connect(app)
    connection.data_received(GET.replace(b"GET", b"HEAD"))
    await all_of(connection)
    (head,) = socket.written
    assert head.endswith(b"\r\n\r\n")
    assert socket.closed


async def test_a_client_that_waits_to_send_its_body_is_told_at_once() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await start(send, len(message["body"]))
        await body(send, message["body"])

    connection, socket = connect(app)
    connection.data_received(b"POST / HTTP/1.1\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    await asyncio.sleep(0)
    assert socket.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    connection.data_received(b"hi")
    await all_of(connection)
    assert len(socket.written) == 2
    assert socket.written[1].endswith(b"\r\n\r\nhi")


async def test_nothing_is_written_to_a_connection_that_is_gone() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 2)
        socket.closed = True  # by the other side
        await asyncio.sleep(0)

    connection, socket = connect(app)
    connection.data_received(GET)
    await all_of(connection)
    await asyncio.sleep(0)
    assert socket.written == []
