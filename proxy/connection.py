"""Connections of clients: whole bodies, whole answers and pieces of streams go past ASGI, and out at the turn's end.

Each write wakes a client, which then often has this process's core: what else waits for its turn waits for that as
well. So all that waits is done first, and then all is written. Uvicorn's head and body become one write by the way.
And each piece of a stream passes through several calls between here and the socket, of which a token needs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_HELD_BYTES = 1 << 16
"""To one client: then its transport is to know how much there is, for the sake of flow control."""
_OK = b"HTTP/1.1 200 OK\r\n"
_KEY = "epd.connection"


class Connection(HttpToolsProtocol):
    """One connection of a client."""

    _on_lost: Callable[[], None] | None = None

    @staticmethod
    def of(scope: Scope) -> Connection | None:
        """That which a request came by; None: it came by another server."""
        found: Connection | None = scope.get("extensions", {}).get(_KEY)
        return found

    def write_piece(self, scope: Scope, words: bytes) -> bool:
        """Write a piece of an answer that has begun and goes on, past ASGI.

        Args:
            scope: of the request.
            words: not the last ones.

        Returns:
            False where nothing was written and ASGI's `send` is to do it: the client lags or is gone, or the answer is
            not sent in chunks.
        """
        cycle = self.cycle
        is_stream = cycle.scope is scope and cycle.chunked_encoding and not cycle.response_complete
        if not is_stream or self.flow.write_paused or cycle.disconnected or not words:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(words), words))
        return True

    def write_answer(self, scope: Scope, headers: bytes, body: bytes) -> bool:
        """Write a whole answer of status 200, past ASGI.

        Args:
            scope: of the request, which has had no answer.
            headers: each with an end of line, content-length among them.
            body: of the answer.

        Returns:
            False where nothing was written and ASGI's `send` is to do it: the client is gone, lags with what it asked
            for before, or wants no body.
        """
        cycle = self.cycle
        is_open = cycle.scope is scope and not (cycle.response_started or cycle.disconnected)
        if not is_open or self.flow.write_paused or scope["method"] == "HEAD":
            return False
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        end = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
        usual = [b"%b: %b\r\n" % pair for pair in cycle.default_headers]
        self.transport.write(b"".join((_OK, *usual, headers, end, body)))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def call_when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback`, and nobody else, when the client leaves."""
        self._on_lost = callback
        if self.transport.is_closing():
            self.loop.call_soon(self._tell_lost)
        else:  # a large last piece of a body paused it: nobody would see the client leave
            self.flow.resume_reading()

    def forget(self, callback: Callable[[], None]) -> None:
        """Do not call it any more."""
        if self._on_lost == callback:  # else it is that of the next request
            self._on_lost = None

    def _tell_lost(self) -> None:
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()

    def take_body(self, scope: Scope) -> bytearray | None:
        """The body of a request, past ASGI; None: not all of it is here, and `receive` is to be awaited."""
        cycle = self.cycle
        if cycle.scope is not scope or cycle.more_body or cycle.disconnected or cycle.response_complete:
            return None
        body, cycle.body = cycle.body, bytearray()
        cycle.waiting_for_100_continue = False
        cycle.message_event.clear()  # whoever receives next waits for the client to leave
        self.flow.resume_reading()
        return body

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["extensions"] = {_KEY: self}  # type: ignore[dict-item]

    def connection_lost(self, exc: Exception | None) -> None:
        """Implements `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._tell_lost()
        if self.scope is not None:
            self.scope["extensions"] = {}  # they hold each other

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Implements `asyncio.Protocol`."""
        super().connection_made(cast(asyncio.Transport, _Writer(transport)))


class _Writer:
    """A transport that writes what a turn of the event loop has for it at the turn's end, in one piece."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._write, self.is_closing = transport.write, transport.is_closing
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._held_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write it, soon."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _MOST_HELD_BYTES:
            self._flush()

    def close(self) -> None:
        """Close the connection when all is written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        if held and not self.is_closing():
            self._write(b"".join(held))
