"""Heads of answers go out with their bodies, and never later than the event loop's next turn; pieces go straight."""

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
        self.failures: list[BaseException] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def resume_reading(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass


async def start(send: Send, length: int | None, **headers: str) -> None:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    pairs += [] if length is None else [(b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": pairs})


async def body(send: Send, words: bytes, *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": words, "more_body": more})


def connect(app: App) -> tuple[Connection, Socket]:
    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except BaseException as error:
            socket.failures.append(error)
            raise

    connection, socket = Connection(uvicorn.Config(watched, log_config=None), ServerState(), {}), Socket()
    connection.connection_made(socket)
    return connection, socket


async def all_of(connection: Connection, socket: Socket) -> None:
    """Wait for the end of all requests. Raises what one of them failed of, which uvicorn only logs."""
    await asyncio.gather(*connection.tasks)
    for error in socket.failures:
        raise error


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_a_short_answer_is_one_write(keep_alive: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 2)
        await body(send, b"hi")

    connection, socket = connect(app)
    request = GET if keep_alive else GET.replace(b"host: x", b"connection: close")
    connection.data_received(request)
    await all_of(connection, socket)
    (answer,) = socket.written
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nhi")
    assert socket.closed is not keep_alive


async def test_pieces_go_out_with_the_turn_that_they_come_in() -> None:
    turns = [asyncio.Event(), asyncio.Event()]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, None)
        for words in (b"one", b"HTTP/1.1 2"):
            await body(send, words, more=True)
        await turns[0].wait()
        await body(send, b"three", more=True)
        await turns[1].wait()
        await body(send, b"")

    connection, socket = connect(app)
    connection.data_received(GET)
    async with asyncio.timeout(5):
        for turn, written in enumerate(turns, 1):
            while len(socket.written) < turn:
                await asyncio.sleep(0)
            written.set()
    await all_of(connection, socket)
    first, *others = socket.written
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\n3\r\none\r\na\r\nHTTP/1.1 2\r\n")
    assert others == [b"5\r\nthree\r\n", b"0\r\n\r\n"]


async def test_much_goes_out_at_once_so_that_a_client_that_lags_is_noticed() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, None)
        await body(send, bytes(1 << 17), more=True)
        written.append(len(socket.written))
        await body(send, b"")

    written: list[int] = []
    connection, socket = connect(app)
    connection.data_received(GET)
    await all_of(connection, socket)
    assert written == [1]


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
    await all_of(connection, socket)
    assert socket.written[1:] == [b"hi"]


async def test_a_head_without_a_body_goes_out_before_the_end() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 2, connection="close")
        await body(send, b"hi")

    connection, socket = connect(app)
    connection.data_received(GET.replace(b"GET", b"HEAD"))
    await all_of(connection, socket)
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
    async with asyncio.timeout(5):
        while not socket.written:
            await asyncio.sleep(0)
    assert socket.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    connection.data_received(b"hi")
    await all_of(connection, socket)
    assert len(socket.written) == 2
    assert socket.written[1].endswith(b"\r\n\r\nhi")


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_pieces_go_straight_between_others(keep_alive: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        way = Connection.of(scope)
        assert way is not None
        assert not way.write_piece(scope, b"too early")
        await start(send, None)
        assert way.write_piece(scope, b"one")
        await body(send, b"two", more=True)
        assert way.write_piece(scope, b"three")
        assert not way.write_piece(scope, b"")  # would end it
        assert not way.write_piece(dict(scope), b"another request's")
        connection.pause_writing()
        assert not way.write_piece(scope, b"the client lags")
        connection.resume_writing()
        await body(send, b"")
        assert not way.write_piece(scope, b"too late")

    connection, socket = connect(app)
    connection.data_received(GET if keep_alive else GET.replace(b"host: x", b"connection: close"))
    await all_of(connection, socket)
    _, _, chunks = b"".join(socket.written).partition(b"\r\n\r\n")
    assert chunks == b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n"
    assert len(socket.written) == 1


async def test_pieces_do_not_go_where_there_are_no_chunks() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        way = Connection.of(scope)
        assert way is not None
        is_head = scope["method"] == "HEAD"
        await start(send, None if is_head else 3)
        assert not way.write_piece(scope, b"one")
        await body(send, b"one")

    for request in (GET, GET.replace(b"GET", b"HEAD")):
        connection, socket = connect(app)
        connection.data_received(request)
        await all_of(connection, socket)
        assert len(b"".join(socket.written).split(b"one")) == 1 + request.startswith(b"GET")


async def test_pieces_do_not_go_to_a_client_that_is_gone() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, None)
        connection.connection_lost(None)
        assert not connection.write_piece(scope, b"one")
        assert Connection.of(scope) is None

    connection, socket = connect(app)
    connection.data_received(GET)
    await all_of(connection, socket)
    assert socket.closed


async def test_an_earlier_answer_is_not_mixed_up_with_the_next_one() -> None:
    """A client may send a request before the answer to the one before has ended."""
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, None)
        await go_on.wait()
        assert connection.write_piece(scope, b"x") is (scope["path"] == "/2")
        await body(send, scope["path"].encode())

    connection, socket = connect(app)
    connection.data_received(GET.replace(b"/ ", b"/1 ") + GET.replace(b"/ ", b"/2 "))
    await asyncio.sleep(0)
    go_on.set()
    while connection.tasks:
        await all_of(connection, socket)
    answers = [part.partition(b"\r\n\r\n")[2] for part in b"".join(socket.written).split(b"HTTP/1.1")[1:]]
    assert answers == [b"2\r\n/1\r\n0\r\n\r\n", b"1\r\nx\r\n2\r\n/2\r\n0\r\n\r\n"]


async def test_nothing_is_written_to_a_connection_that_is_gone() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 2)
        socket.closed = True  # by the other side
        await asyncio.sleep(0)

    connection, socket = connect(app)
    connection.data_received(GET)
    await all_of(connection, socket)
    await asyncio.sleep(0)
    assert socket.written == []


async def test_an_answer_past_asgi_is_one_write_and_frees_the_connection() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        own = Connection.of(scope)
        assert own is not None
        assert own.write_answer(scope, b"content-length: 2\r\n", b"hi")
        assert not own.write_answer(scope, b"content-length: 2\r\n", b"no")  # there has been one

    connection, socket = connect(app)
    for request in (GET, GET.replace(b"host: x", b"connection: close")):
        connection.data_received(request)
        await all_of(connection, socket)
    first, last = socket.written
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"content-length: 2\r\n\r\nhi")
    assert last.endswith(b"content-length: 2\r\nconnection: close\r\n\r\nhi")
    assert socket.closed


async def test_a_body_is_taken_at_once_only_when_all_of_it_is_here() -> None:
    taken: list[bytearray | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        own = Connection.of(scope)
        assert own is not None
        taken.append(own.take_body(scope))
        assert (await receive())["body"] == b"ab"
        await receive()
        await start(send, 0)
        await body(send, b"")

    connection, socket = connect(app)
    connection.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nab")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    connection.data_received(b"c")
    await all_of(connection, socket)
    assert taken == [None]


async def test_whoever_takes_a_body_at_once_can_wait_for_the_client_to_leave() -> None:
    taken: list[bytearray | None] = []
    left: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        own = Connection.of(scope)
        assert own is not None
        taken.append(own.take_body(scope))
        own.call_when_lost(lambda: left.append("told"))
        left.append((await receive())["type"])

    connection, socket = connect(app)
    connection.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc")
    await asyncio.sleep(0)
    connection.connection_lost(None)
    await all_of(connection, socket)
    assert taken == [bytearray(b"abc")]
    assert left == ["told", "http.disconnect"]


async def test_reading_goes_on_behind_a_large_last_piece_so_that_a_client_that_leaves_is_noticed() -> None:
    paused: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        paused.append(connection.flow.read_paused)
        connection.call_when_lost(lambda: None)
        paused.append(connection.flow.read_paused)
        await start(send, 0)
        await body(send, b"")

    connection, socket = connect(app)
    size = 1 << 17
    connection.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
    for _ in range(3):
        await asyncio.sleep(0)  # the application waits for the body
    connection.data_received(bytes(size))
    await all_of(connection, socket)
    assert paused == [True, False]
