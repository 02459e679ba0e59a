"""Addresses of sockets: what people write, what ZeroMQ takes, and what a worker tells others.

`/tmp/x` is `ipc:///tmp/x`; `host:port` and `[v6]:port` are TCP; full URLs stay as they are. An address to listen on may
also name all interfaces (`*:7001`, `0.0.0.0:7001`, `[::]:7001`) and leave the port open (`10.0.0.2:0`): then
`advertised` finds what others can dial.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from epd.errors import ConfigError

_MAX_IPC_PATH_BYTES = 107
"""`sun_path` of a Unix socket, less the closing NUL."""
_TCP = "tcp://"
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Reserved for documentation (RFC 5737, RFC 3849): routed like any foreign host, and nothing is ever sent there."""


def endpoint(address: str) -> str:
    """The ZeroMQ endpoint that an address means.

    Raises:
        ConfigError: neither a path, nor host:port, nor an ipc:// or tcp:// URL.
    """
    return _endpoint(address, any_port=False)


def listening_endpoint(address: str, *, any_port: bool = False) -> str:
    """Like `endpoint`, for a socket that listens: `*` means all interfaces.

    Args:
        address: what the user wrote.
        any_port: port 0 is taken, and means a free one.
    """
    return _endpoint(address, any_port=any_port)


def _endpoint(address: str, *, any_port: bool) -> str:
    address = address.strip()
    if address.startswith("/"):
        address = f"ipc://{address}"
    elif "://" not in address:
        address = f"{_TCP}{address}"
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        if len(os.fsencode(rest)) > _MAX_IPC_PATH_BYTES:
            raise ConfigError(f"address {address!r}: a socket path can have at most {_MAX_IPC_PATH_BYTES} bytes")
        return address
    if scheme == "tcp" and _is_host_and_port(address, any_port=any_port):
        return address
    raise ConfigError(f"address {address!r}: use a path (/tmp/worker_0), host:port, ipc:///path or tcp://host:port")


def _is_host_and_port(url: str, *, any_port: bool) -> bool:
    try:
        parts = urlsplit(url)
        # Port 0 is a free one that no peer could know.
        has_port = parts.port is not None if any_port else bool(parts.port)
        return bool(parts.hostname) and has_port and not parts.path
    except ValueError:
        return False


def endpoints(addresses: Iterable[str]) -> tuple[str, ...]:
    """The endpoints in a list given as several words, comma-separated, or both; order kept, repetitions dropped."""
    words = (word for entry in addresses for word in entry.split(",") if word.strip())
    return tuple(dict.fromkeys(endpoint(word) for word in words))


def with_port(endpoint_: str, port: int) -> str:
    """A TCP endpoint with another port."""
    return f"{endpoint_.rpartition(':')[0]}:{port}"


def is_public(address: str) -> bool:
    """Whether other hosts can reach a socket that listens on this endpoint."""
    return address.startswith(_TCP) and not _is_loopback(urlsplit(address).hostname or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_wildcard(host: str) -> bool:
    if host == "*":
        return True
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _tcp(host: str, port: int) -> str:
    return f"{_TCP}[{host}]:{port}" if ":" in host else f"{_TCP}{host}:{port}"


def advertised(bound: str, advertise: str | None, towards: Iterable[str]) -> str:
    """The endpoint that others are told for a worker that listens on `bound`.

    Args:
        bound: endpoint with its real port.
        advertise: what the user wants others to be told: host:port, or a host whose port is the one of `bound`.
        towards: hosts of those who are told, such as proxies and the metastore. This host's address on the way to
            them is taken when `bound` names all interfaces.

    Raises:
        ConfigError: `advertise` is no such address, or this host's own address can't be found.
    """
    if advertise is not None:
        return _chosen(bound, advertise.strip())
    if not bound.startswith(_TCP):
        return bound
    parts = urlsplit(bound)
    if not _is_wildcard(parts.hostname or ""):
        return bound
    assert parts.port is not None, "bound"
    return _tcp(_own_address(tuple(towards)), parts.port)


def _chosen(bound: str, advertise: str) -> str:
    if not bound.startswith(_TCP):
        raise ConfigError(
            f"--advertise-addr {advertise}: --worker-addr is {bound}, which other hosts can't reach anyway"
        )
    candidate = endpoint_or_none(advertise) or endpoint_or_none(f"{advertise}:{urlsplit(bound).port}")
    if candidate is None or not candidate.startswith(_TCP) or _is_wildcard(urlsplit(candidate).hostname or ""):
        raise ConfigError(
            f"--advertise-addr {advertise}: give host:port, or a host, under which others reach this worker"
        )
    return candidate


def endpoint_or_none(address: str) -> str | None:
    """The endpoint that an address means; None when it is none."""
    try:
        return endpoint(address)
    except ConfigError:
        return None


def host_of(url: str) -> str | None:
    """The host in an endpoint or any other URL; None when it names none (a socket path)."""
    try:
        return None if url.startswith("ipc:") else urlsplit(url).hostname
    except ValueError:
        return None


def _own_address(towards: tuple[str, ...]) -> str:
    """This host's address as those in `towards` see it; one that only this host knows comes last."""
    found = [own for host in (*towards, *_ELSEWHERE) if (own := _source_address(host))]
    found += _addresses_of_own_name()
    found.sort(key=_is_loopback)  # stable: the first that others can use, if there is one
    # A loopback address is right where everybody who is told dials a loopback address himself.
    if not found or (_is_loopback(found[0]) and not all(map(_is_loopback, towards))):
        raise ConfigError("this host's own address can't be found: say it with --advertise-addr HOST:PORT")
    return found[0]


def _source_address(host: str) -> str | None:
    """The local address from which packets to `host` leave. Connecting a UDP socket sends nothing."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    return None


def _addresses_of_own_name() -> list[str]:
    with contextlib.suppress(OSError, UnicodeError):
        return [str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    return []


__all__ = [
    "advertised",
    "endpoint",
    "endpoint_or_none",
    "endpoints",
    "host_of",
    "is_public",
    "listening_endpoint",
    "with_port",
]
