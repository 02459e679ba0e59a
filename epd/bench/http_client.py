"""A small HTTP/1.1 client that costs little: a load generator on the server's own cores must not be the load.

Per chunk of a stream it takes about a tenth of what a full client takes. Connections are kept alive and reused; one
request at a time is on each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from epd.credentials import Credentials
from epd.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0
_DEFAULT_PORTS = {"http": 80, "https": 443}

_NO_CREDENTIALS = Credentials()

OnBody = Callable[[bytes], None]
OnHeader = Callable[[bytes, bytes], None]


class ServerGone(Exception):
    """The connection could not be made, or broke before the answer was complete."""


@dataclass(frozen=True)
class _Target:
    host: str
    port: int
    path: str
    tls: bool


class HttpClient:
    """Requests to one base URL. Used on one event loop.

    Args:
        base_url: such as `http://127.0.0.1:8000/v1`.
        credentials: the key to send, and whom to trust behind https.

    Raises:
        ConfigError: the URL is not http(s)://host, or a file of the credentials is wrong.
    """

    def __init__(self, base_url: str, credentials: Credentials = _NO_CREDENTIALS) -> None:
        self._target = _parse(base_url)
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in credentials.headers().items())
        self._tls = credentials.tls() if self._target.tls else None
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        on_body: OnBody | None = None,
        on_header: OnHeader | None = None,
    ) -> int:
        """Send a request and pass the answer's body on, piece by piece, as it arrives.

        Args:
            method: GET or POST.
            path: below the base URL, such as `/models`; `body` is JSON.
            body: empty for none.
            on_body: called for each piece, chunks decoded. May be called before the status is known to the caller.
            on_header: called for each header of the answer, name and value, before the body.

        Returns:
            The HTTP status, once the answer is complete.

        Raises:
            ServerGone: no connection, or it broke.
        """
        head = self._head(method, path, len(body))
        connection, is_reused = await self._connection()
        try:
            status = await connection.exchange(head + body, on_body or _ignore, on_header)
        except ServerGone:
            # The server may have closed a connection that idled; a fresh one has no such excuse.
            if not is_reused or connection.has_received:
                raise
            connection = await self._connect()
            status = await connection.exchange(head + body, on_body or _ignore, on_header)
        if connection.is_reusable:
            self._idle.append(connection)
        return status

    def close(self) -> None:
        """Drop all connections."""
        for connection in list(self._all):
            connection.abort()

    def _head(self, method: str, path: str, length: int) -> bytes:
        target = self._target
        host = f"[{target.host}]" if ":" in target.host else target.host
        lines = [f"{method} {target.path}{path} HTTP/1.1", f"Host: {host}:{target.port}", "Accept: */*"]
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return ("\r\n".join(lines) + f"\r\n{self._headers}\r\n").encode()

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection, True
        return await self._connect(), False

    async def _connect(self) -> _Connection:
        target = self._target
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self._all.discard),
                    target.host,
                    target.port,
                    ssl=self._tls,
                )
        except (OSError, TimeoutError) as error:
            raise ServerGone(f"can't connect to {target.host}:{target.port}: {error}") from error
        self._all.add(connection)
        return connection


def _parse(base_url: str) -> _Target:
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--base-url {base_url}: {error}") from error
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(f"--base-url {base_url}: want http://host:port/v1")
    return _Target(
        parts.hostname, port or _DEFAULT_PORTS[parts.scheme], parts.path.rstrip("/"), parts.scheme == "https"
    )


def _ignore(_: bytes) -> None:
    pass


class _Connection(asyncio.Protocol):
    """One connection; also the callbacks of httptools' parser."""

    def __init__(self, closed: Callable[[_Connection], None]) -> None:
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: asyncio.Future[int] | None = None
        self._on_body: OnBody = _ignore
        self._on_header: OnHeader | None = None
        self.has_received = False
        """Something of the answer to the last request has arrived."""
        self.is_reusable = False

    async def exchange(self, request: bytes, on_body: OnBody, on_header: OnHeader | None) -> int:
        self.has_received = self.is_reusable = False
        self._on_body, self._on_header = on_body, on_header
        self._parser = httptools.HttpResponseParser(self)
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is None or self._transport.is_closing():
            raise ServerGone("the server closed the connection")
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None
            if not self.is_reusable:
                self.abort()

    def abort(self) -> None:
        self.is_reusable = False
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has another base class

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        self.has_received = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is no HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_reusable = False
        self._closed(self)
        self._fail(f"the server closed the connection{f': {error}' if error else ''}")

    def _fail(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ServerGone(reason))

    # -- httptools -----------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._on_header is not None:
            self._on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._on_body(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self.is_reusable = self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._parser.get_status_code())
