"""TCP servers and connections of tests that leave nothing open, whatever happens to the test.

What a test leaves open is found whenever Python next looks for garbage, and blamed on the test that runs then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
_CLOSING_S = 10.0


class TcpServer:
    """Serves each connection of a loopback port by `handler`, in a task.

    A connection is closed when its handler has ended, after what it wrote has left. A client that hangs up in the midst
    ends a handler quietly; what else it raises is raised at the server's end.

    Args:
        handler: need not close what it is given.
        port: to listen on; 0: any.
        options: of `asyncio.start_server`.
    """

    def __init__(self, handler: Handler, *, port: int = 0, **options: Any) -> None:
        self._handler, self._port, self._options = handler, port, options
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.StreamWriter, asyncio.Future[None]] = {}

    @property
    def port(self) -> int:
        """Where it listens, once it does."""
        return self._port

    @property
    def url(self) -> str:
        """The same as http:// URL, without a slash at the end."""
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, **self._options)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cancel all handlers and drop all connections. Not started, or closed already: nothing."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        connections, self._connections = self._connections, {}
        for task in connections.values():
            task.cancel()
        ends = await asyncio.gather(*connections.values(), return_exceptions=True)
        for writer in connections:
            await drop(writer)
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, OSError | EOFError):
                raise end

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it came while the server was closed
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._handler(reader, writer))
        # Not by the handler itself: a task that is cancelled before its first step runs none of it.
        task.add_done_callback(lambda _: writer.close())
        self._connections[writer] = task


@contextlib.asynccontextmanager
async def connected(port: int, **options: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a loopback port; `options` are those of `asyncio.open_connection`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield reader, writer
    finally:
        await drop(writer)


async def drop(writer: asyncio.StreamWriter) -> None:
    """Close a connection at once, with what has not left yet, and wait until its socket is closed."""
    transport_socket = writer.get_extra_info("socket")
    if transport_socket is not None and transport_socket.fileno() != -1:  # Python 3.11 fails to abort what is closed
        writer.transport.abort()
    with contextlib.suppress(OSError):
        await asyncio.wait_for(writer.wait_closed(), _CLOSING_S)
