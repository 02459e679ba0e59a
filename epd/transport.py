"""The only place where ZeroMQ sockets are made.

A worker binds one `Router` on its address; proxies and encoders connect a `Dealer` to it; answers come back on the
connection that asked. Both have finite queues, never linger, and turn a vanished peer into `PeerGone`.

Addresses (`endpoint`): `/tmp/x` is `ipc:///tmp/x`; `host:port` and `[v6]:port` are TCP; full URLs stay
as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket as unix_socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from epd import codec
from epd.codec import Buffer
from epd.errors import ConfigError, ProtocolError
from epd.messages import AnyMessage

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 4096
"""Messages queued per peer and direction before a send waits."""
SEND_TIMEOUT_S = 5.0
"""A peer that takes nothing for so long is treated as gone."""
_FULL_PIPE_RETRY_S = 0.002
_MAX_IPC_PATH_BYTES = 107
"""`sun_path` of a Unix socket, less the closing NUL."""


class PeerGone(Exception):
    """The peer of a connection has vanished or does not take messages any more."""


def endpoint(address: str) -> str:
    """The ZeroMQ endpoint that an address means.

    Raises:
        ConfigError: neither a path, nor host:port, nor an ipc:// or tcp:// URL.
    """
    address = address.strip()
    if address.startswith("/"):
        address = f"ipc://{address}"
    elif "://" not in address:
        address = f"tcp://{address}"
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        if len(os.fsencode(rest)) > _MAX_IPC_PATH_BYTES:
            raise ConfigError(f"address {address!r}: a socket path can have at most {_MAX_IPC_PATH_BYTES} bytes")
        return address
    if scheme == "tcp" and _is_host_and_port(address):
        return address
    raise ConfigError(f"address {address!r}: use a path (/tmp/worker_0), host:port, ipc:///path or tcp://host:port")


def _is_host_and_port(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # Port 0 is a free one that no peer could know.
        return bool(parts.hostname) and bool(parts.port) and not parts.path
    except ValueError:
        return False


def endpoints(addresses: Iterable[str]) -> tuple[str, ...]:
    """The endpoints in a list given as several words, comma-separated, or both; order kept, repetitions dropped."""
    words = (word for entry in addresses for word in entry.split(",") if word.strip())
    return tuple(dict.fromkeys(endpoint(word) for word in words))


def _is_public(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _make_socket(kind: int) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    # libzmq drops the connection of a peer that announces a larger frame, before it allocates anything.
    socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_BUFFER_BYTES)
    return socket


async def _send(socket: zmq.asyncio.Socket, frames: list[Buffer], timeout_s: float) -> None:
    """Send, waiting while the peer's queue is full: back-pressure for the caller, loss for nobody."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            await socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
            return
        except zmq.Again:
            # POLLOUT of a ROUTER tells about any peer, not about this one, so it can't be waited for.
            if time.monotonic() > deadline:
                raise PeerGone(f"the peer took no message for {timeout_s:g} s") from None
            await asyncio.sleep(_FULL_PIPE_RETRY_S)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.ENOTSOCK, zmq.ETERM):
                raise PeerGone("the peer is not connected") from None
            raise


class Router:
    """The server side: many peers on one bound address."""

    def __init__(self, address: str) -> None:
        self.address = endpoint(address)
        self._socket = _make_socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._is_bound = False

    def bind(self) -> None:
        """Start to listen.

        Raises:
            ConfigError: the address is in use or can't be bound.
        """
        if self.address.startswith("tcp://") and _is_public(self.address):
            log.warning("%s is reachable from other hosts, without encryption or authentication", self.address)
        _refuse_address_in_use(self.address)
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            raise ConfigError(f"can't listen on {self.address}: {error}") from error
        self._is_bound = True

    async def receive(self) -> tuple[bytes, AnyMessage, list[memoryview]]:
        """The next message, with the id of its sender to answer to.

        Raises:
            ProtocolError: the message is malformed; the next one may be fine.
        """
        peer, *frames = await self._socket.recv_multipart(copy=False)
        message, buffers = codec.decode([frame.buffer for frame in frames])
        return peer.bytes, message, buffers

    async def send(self, peer: bytes, message: AnyMessage, *buffers: Buffer, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Answer `peer`, waiting up to `timeout_s` for room in its queue.

        Raises:
            PeerGone: it has disconnected or does not read.
        """
        await _send(self._socket, [peer, *codec.encode(message, *buffers)], timeout_s)

    def close(self) -> None:
        """Stop listening; a socket file goes too. Answers that are on their way get a moment."""
        self._socket.close(linger=500)
        if self._is_bound and self.address.startswith("ipc://"):
            Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)


def _refuse_address_in_use(address: str) -> None:
    """Binding an IPC path takes it away from a live process without an error, so ask first."""
    if not address.startswith("ipc://"):
        return

    with contextlib.closing(unix_socket.socket(unix_socket.AF_UNIX)) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return
    raise ConfigError(f"can't listen on {address}: another process does")


class Dealer:
    """The client side: one connection to one address. It is not reused after the peer has gone: make another."""

    def __init__(self, address: str) -> None:
        self.address = endpoint(address)
        self._socket = _make_socket(zmq.DEALER)
        # ZMQ_IMMEDIATE would keep messages from queueing for a peer that is not there yet, but it also throws away what
        # has arrived and was not read when the peer disconnects. So `send` waits for the handshake instead.
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._pending: asyncio.Future[list[zmq.Frame]] | None = None
        self._connected = asyncio.Event()
        self._lost: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    def connect(self) -> None:
        """Begin to connect; needs a running event loop. libzmq keeps trying until the peer is there or `close`."""
        self._lost = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch_connection(), name=f"watch {self.address}")
        self._socket.connect(self.address)

    async def _watch_connection(self) -> None:
        assert self._lost is not None
        while not self._lost.done():
            event = parse_monitor_message(await self._monitor.recv_multipart())
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._lost.set_result(None)
            else:
                self._connected.set()

    async def receive(self) -> tuple[AnyMessage, list[memoryview]]:
        """The next message; what arrived before the peer vanished is still delivered.

        Raises:
            PeerGone: the connection was lost.
            ProtocolError: the message is malformed; the next one may be fine.
        """
        assert self._lost is not None, "connect first"
        pending = self._pending or asyncio.ensure_future(self._socket.recv_multipart(copy=False))
        self._pending = pending
        if not pending.done():
            waited: set[asyncio.Future[Any]] = {pending, self._lost}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not pending.done():
            # The poll also lets `pending` take what is there, after which there is nothing to poll.
            is_readable = await self._socket.poll(0)
            if not is_readable and not pending.done():
                raise PeerGone(f"lost the connection to {self.address}")
        frames = await pending
        self._pending = None
        return codec.decode([frame.buffer for frame in frames])

    async def send(self, message: AnyMessage, *buffers: Buffer, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Send to the peer, waiting up to `timeout_s` for a connection or for room in its queue.

        Raises:
            PeerGone: the connection was lost, or the peer took nothing for so long.
        """
        if self._lost is None or self._lost.done():
            raise PeerGone(f"not connected to {self.address}")
        if not self._connected.is_set():
            await self._wait_connected(timeout_s)
        await _send(self._socket, codec.encode(message, *buffers), timeout_s)

    async def _wait_connected(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise PeerGone(f"nobody answers at {self.address}") from None

    def close(self) -> None:
        """Drop the connection and what is queued on it."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._pending is not None:
            self._pending.cancel()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)


__all__ = ["Dealer", "PeerGone", "ProtocolError", "Router", "endpoint", "endpoints"]
