"""Who is let in: CURVE on every socket of a process, and the count of those who are turned away.

With `use_cluster_keys` all traffic is encrypted, and a connection needs the cluster's key pair on both sides
(http://curvezmq.org). libzmq asks for each client over the ZeroMQ Authentication Protocol (ZAP,
https://rfc.zeromq.org/spec/27/); `_Gatekeeper` answers. Without keys everybody who reaches a socket is let in, and only
those who do not speak ZMTP are turned away.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import socket as os_socket
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from epd.keys import ClusterKeys

log = logging.getLogger(__name__)

HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_GUARDED = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILED
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_DOMAIN = b"epd"
_END = b"end"
_END_TIMEOUT_S = 2.0
_MAX_REMEMBERED = 1000
"""Addresses that were warned of; of more than these only the count tells."""


class _Door:
    """What holds for the whole process, so that no socket can be forgotten."""

    keys: ClusterKeys | None = None
    gatekeepers: ClassVar[dict[int, _Gatekeeper]] = {}
    """By ZeroMQ context, which asks its own only."""


def use_cluster_keys(keys: ClusterKeys | None) -> None:
    """From now on every socket that this process makes lets in, and talks to, only who has these keys.

    None: no encryption, as at the start.
    """
    _Door.keys = keys


def has_keys() -> bool:
    """Whether sockets are made with cluster keys."""
    return _Door.keys is not None


def secure(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], *, is_server: bool) -> None:
    """Put the cluster's keys on a socket that is neither bound nor connected yet, if there are any."""
    keys = _Door.keys
    if keys is None:
        return
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    if not is_server:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public)
        return
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
    # Without an answer from the gatekeeper nobody is let in.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    if context.underlying not in _Door.gatekeepers:
        _Door.gatekeepers[context.underlying] = gatekeeper = _Gatekeeper(context)
        gatekeeper.start()


def monitor(socket: zmq.Socket[bytes], events: int) -> Any:
    """The asynchronous socket that tells of a socket's events, to be read with `parse_monitor_message`."""
    address = f"inproc://monitor-{int(socket.getsockopt(zmq.FD))}"
    socket.monitor(address, events)
    listener = zmq.asyncio.Context.shadow(socket.context.underlying).socket(zmq.PAIR)
    listener.connect(address)
    return listener


class _Gatekeeper(threading.Thread):
    """Tells libzmq whether a client may come in: yes, if its key is the cluster's.

    A thread, so that nobody waits at the door while the event loop is busy.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__(name="gatekeeper", daemon=True)
        self._context = context
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ENDPOINT)
        # The interpreter destroys the context at its end, which waits until all sockets are closed.
        atexit.register(self._end)

    def run(self) -> None:
        """Answer until told to end."""
        with contextlib.suppress(zmq.ContextTerminated), self._socket:
            while (frames := self._socket.recv_multipart()) != [_END]:
                version, number, _, _, _, mechanism, *credentials = frames
                keys = _Door.keys
                is_member = mechanism == b"CURVE" and keys is not None and credentials == [z85.decode(keys.public)]
                status = (b"200", b"") if is_member else (b"400", b"these are not the cluster's keys")
                self._socket.send_multipart([version, number, *status, b"", b""])

    def _end(self) -> None:
        with contextlib.suppress(zmq.ZMQError), self._context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(_ZAP_ENDPOINT)
            socket.send(_END)
            self.join(_END_TIMEOUT_S)


@dataclass
class _Visitor:
    """A connection. `socket` is our own copy of its descriptor, which tells who ended it."""

    name: str
    socket: os_socket.socket

    def was_cut_by_us(self) -> bool:
        """Asked when libzmq has closed its own copy: has the peer not hung up?"""
        try:
            return self.socket.recv(1, os_socket.MSG_PEEK | os_socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False


class Guard:
    """Watches a listening socket, and counts and names the connections that were turned away.

    That is: no keys or other keys, no ZMTP at all (garbage, a browser), a frame larger than allowed.
    """

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        self.refused = 0
        """Connections turned away since the start."""
        self._socket = socket
        self._address = address
        self._monitor = monitor(socket, _GUARDED)
        self._visitors: dict[int, _Visitor] = {}
        self._reason = ""
        self._told: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch; needs a running event loop. Call before the socket is bound."""
        self._task = asyncio.create_task(self._watch(), name=f"guard {self._address}")

    async def _watch(self) -> None:
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            kind, value = event["event"], event["value"]
            if kind == zmq.EVENT_ACCEPTED:
                self._enter(value)
            elif kind == zmq.EVENT_DISCONNECTED:
                self._leave(value)
            else:
                self.refused += 1
                self._reason = _REASONS[kind]

    def _enter(self, descriptor: int) -> None:
        with contextlib.suppress(OSError):  # gone already
            copy = os_socket.socket(fileno=os_socket.dup(descriptor))
            self._visitors[descriptor] = _Visitor(_name_of(copy), copy)

    def _leave(self, descriptor: int) -> None:
        # libzmq reports a failed handshake and the end of its connection one after the other, from one thread.
        reason, self._reason = self._reason, ""
        visitor = self._visitors.pop(descriptor, None)
        if visitor is None:  # gone before it was looked at: nobody who wants an answer leaves so soon
            was_cut, name = True, "somebody"
        else:
            with visitor.socket:
                was_cut, name = visitor.was_cut_by_us(), visitor.name
        if was_cut and not reason:
            self.refused += 1
            reason = "it sent an oversized frame or broken framing"
        if reason:
            self._tell(name, reason)

    def _tell(self, name: str, reason: str) -> None:
        if name not in self._told and len(self._told) < _MAX_REMEMBERED:
            self._told.add(name)
            log.warning("%s turned %s away (further ones are only counted): %s", self._address, name, reason)

    def close(self) -> None:
        """Stop to watch. Call before the socket is closed; again does nothing."""
        if self._monitor.closed:
            return
        if self._task is not None:
            self._task.cancel()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        for visitor in self._visitors.values():
            visitor.socket.close()
        self._visitors.clear()


_REASONS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it hung up, or was silent for too long, during the handshake",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "no valid handshake; it is no member, or its --cluster-keys are not ours",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "its key is not the cluster's",
}


def _name_of(socket: os_socket.socket) -> str:
    if socket.family == os_socket.AF_UNIX:
        return "a process on this host"
    # A socket of IPv6 listens for both, and shows IPv4 as a part of IPv6.
    return str(socket.getpeername()[0]).removeprefix("::ffff:")


__all__ = ["HANDSHAKE_FAILED", "Guard", "has_keys", "secure", "use_cluster_keys"]
