"""HTTP as all dialects use it: bodies within limits, one shape of errors, answers that end when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from epd.errors import ClientError, EPDError, RequestTooLarge, ShuttingDown, Unauthorized
from proxy.api.json_body import Body
from proxy.api.large_body import LargeBody
from proxy.begun import Begun
from proxy.byte_budget import hold
from proxy.connection import Connection
from proxy.request_context import ERROR_WORDS, OUTCOME, REQUEST_ID, note_client_left
from proxy.timers import Alarm, TimeLimit

log = logging.getLogger(__name__)

JSON = "application/json"
_JSON_HEADERS = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_encode = msgspec.json.Encoder().encode
STALLED_CLIENT_S = 120.0
"""A client that takes nothing for so long is treated as gone."""
RETRY_AFTER_S = 1
LONGEST_RETRY_AFTER_S = 60


def error_body(error: EPDError) -> dict[str, Any]:
    """OpenAI's object, with the flat keys of other dialects beside it."""
    inner = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {
        "error": inner,
        "object": "error",
        "message": error.message,
        "type": error.type,
        "code": error.status,
        "param": error.param,
    }


def error_response(error: EPDError) -> Response:
    """The answer that an error becomes before a stream has begun, in the words of the endpoint."""
    words = ERROR_WORDS.get()
    status, body = (error.status, error_body(error)) if words is None else words(error)
    headers = {}
    if error.retryable:
        wanted = math.ceil(error.retry_after_s or RETRY_AFTER_S)
        headers["retry-after"] = str(min(max(wanted, RETRY_AFTER_S), LONGEST_RETRY_AFTER_S))
    if isinstance(error, ClientError) and not isinstance(error, RequestTimeout):
        headers["x-should-retry"] = "false"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, RequestTimeout | ShuttingDown):
        headers["connection"] = "close"  # the rest of the body may trickle in for ever; or another proxy is to be asked
    return Response(msgspec.json.encode(body), status, headers, JSON)


class RequestTimeout(ClientError):
    """The body did not arrive in time."""

    status = 408
    code = "request_timeout"


def header(scope: Scope, name: bytes) -> bytes:
    """The value of the first header of that name, in small letters; empty: there is none."""
    for given, value in scope["headers"]:
        if given == name:
            return bytes(value)
    return b""


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> Body:
    """The body, kept no further than the limit. The server drops what still comes, so that the client reads why.

    Raises:
        RequestTooLarge: it is larger.
        RequestTimeout: it took longer.
        Overloaded: all requests together hold too much.
    """
    announced = header(request.scope, b"content-length")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    connection = Connection.of(request.scope)
    whole = None if connection is None else connection.take_body(request.scope)
    if whole is not None:
        _check_piece(len(whole), 0, max_bytes)
        return whole
    try:
        with TimeLimit(timeout_s):
            return await _read_on(request, max_bytes)
    except TimeoutError:
        raise RequestTimeout(f"The request body did not arrive within {timeout_s:g} s.") from None


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body is larger than {max_bytes} bytes; send smaller or fewer images.")


def _check_piece(piece: int, before: int, max_bytes: int) -> None:
    """Count a piece of a body, of so many bytes, behind so many others."""
    hold(piece)
    if before + piece > max_bytes:
        raise _too_large(max_bytes)


async def _read_on(request: Request, max_bytes: int) -> Body:
    body, has_more = LargeBody(), True
    while has_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece: bytes = message.get("body", b"")
        _check_piece(len(piece), body.size, max_bytes)
        body.add(piece)
        has_more = message.get("more_body", False)
    return body.finish()


class Client:
    """Where an answer is written to. Either `reply` once, or `start_stream`, `write`, `end_stream`.

    Made and closed by `Exchange`; used by one task at a time.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._connection = Connection.of(scope)
        self._outcome = OUTCOME.get()
        self.started = False
        self.headers: dict[str, str] = {}
        """What else the answer's headers say."""
        self._alarm: Alarm | None = None
        """For a client that lags."""
        self._writer: asyncio.Task[object] | None = None
        self._is_stalled = False
        self._sending: Begun[None] | None = None
        """What `write_now` began and could not end."""

    async def reply(self, value: Any) -> None:
        """Answer with one JSON body."""
        body = _encode(value)
        if self._reply_at_once(body):
            return
        await self._start({"content-type": JSON, "content-length": str(len(body))})
        await self._body(body, more=False)

    def _reply_at_once(self, body: bytes) -> bool:
        """Answer past all layers, where none of them wants to see it. Returns whether that was so."""
        connection, outcome = self._connection, self._outcome
        if connection is None or outcome is None or outcome.send is not self._send or self.headers:
            return False
        headers = _JSON_HEADERS % (len(body), REQUEST_ID.get().encode())
        if connection.write_answer(self._scope, headers, body):
            self.started, outcome.status = True, 200
        return self.started

    async def start_stream(self, headers: Mapping[str, str]) -> None:
        """Send status and headers of an answer that comes in pieces."""
        await self._start(headers)

    async def write(self, words: bytes) -> None:
        """Send a piece."""
        await self._body(words)

    def write_now(self, words: bytes) -> bool:
        """Send a piece where no task is at hand, between `start_stream` and `end_stream`.

        Returns:
            Whether another piece may follow. Otherwise the client lags, and `catch_up` has to be awaited.
        """
        assert self._sending is None, "catch up first"
        if self._connection is not None and self._connection.write_piece(self._scope, words):
            return True
        sending = Begun(self._send({"type": "http.response.body", "body": words, "more_body": True}))
        if not sending.is_done:
            self._sending = sending
        return sending.is_done

    @property
    def lags(self) -> bool:
        """Whether it has not taken what `write_now` sent."""
        return self._sending is not None

    async def catch_up(self) -> None:
        """Wait until it has."""
        sending, self._sending = self._sending, None
        if sending is not None:
            await self._patiently(sending)

    async def end_stream(self, words: bytes) -> None:
        """Send the last piece, which may be empty."""
        await self._body(words, more=False)

    def close(self) -> None:
        """Nothing more will be written."""
        if self._alarm is not None:
            self._alarm.stop()
        if self._sending is not None:
            self._sending.close()
            self._sending = None

    async def _start(self, headers: Mapping[str, str]) -> None:
        self.started = True
        pairs = [(name.encode(), value.encode()) for name, value in {**headers, **self.headers}.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": pairs})

    async def _body(self, body: bytes, *, more: bool = True) -> None:
        sending = Begun(self._send({"type": "http.response.body", "body": body, "more_body": more}))
        if not sending.is_done:
            await self._patiently(sending)

    async def _patiently(self, sending: Begun[None]) -> None:
        """Wait until the client has taken it, `STALLED_CLIENT_S` at most."""
        self._writer = asyncio.current_task()
        if self._alarm is None:
            self._alarm = Alarm(self._give_up)
        self._alarm.set(STALLED_CLIENT_S)
        try:
            await sending
        except asyncio.CancelledError:
            if self._is_stalled and self._writer is not None and not self._writer.uncancel():
                raise ClientDisconnect from None
            raise
        finally:
            self._alarm.clear()

    def _give_up(self) -> None:
        if self._writer is not None:
            self._is_stalled = True
            self._writer.cancel()


class Exchange(Response):
    """A response written by a coroutine, which is cancelled as soon as the client disconnects, streaming or not.

    What the coroutine raises before it has started to answer reaches the exception handlers of the app.

    Args:
        write: writes the answer.
    """

    def __init__(self, write: Callable[[Client], Awaitable[object]]) -> None:
        self._write = write
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the coroutine against the client's patience."""
        patience = _Patience(scope, receive)
        client = Client(scope, send)
        try:
            await self._write(client)
        except ClientDisconnect:
            note_client_left()
        except asyncio.CancelledError:
            if not patience.is_over():
                raise
            note_client_left()
            log.info("the client of %s left early", scope["path"])
        finally:
            client.close()
            patience.end()


class _Patience:
    """Cancels the task that made it when the client disconnects. The connection tells; where there is none, ASGI."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._connection = Connection.of(scope)
        self._task = asyncio.current_task(None if self._connection is None else self._connection.loop)
        self._is_over = False
        self._watcher: asyncio.Task[None] | None = None
        if self._connection is not None:
            self._connection.call_when_lost(self._client_left)
        else:
            self._watcher = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_left()

    def _client_left(self) -> None:
        if self._task is not None:
            self._is_over = True
            self._task.cancel()

    def is_over(self) -> bool:
        """Whether that is why the task was cancelled, and nobody else cancelled it too."""
        return self._is_over and self._task is not None and not self._task.uncancel()

    def end(self) -> None:
        """The answer is given, or given up."""
        self._task = None
        if self._connection is not None:
            self._connection.forget(self._client_left)
        if self._watcher is not None:
            self._watcher.cancel()
