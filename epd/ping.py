"""`epd ping`: does this process serve? The health check of containers, and of people.

A worker is asked over its own socket, a proxy over HTTP. The answer comes from where the work is done: a worker whose
engine hangs says so, although its event loop still answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import httpx

from epd.credentials import Credentials
from epd.errors import ProtocolError
from epd.messages import Ping, Pong
from epd.transport import Dealer, PeerGone
from epd.types import WorkerState


async def ping(address: str, *, timeout_s: float, ready: bool, ca_file: Path | None = None) -> tuple[bool, str]:
    """Ask once.

    Args:
        address: of a worker (path, host:port), or the base URL of a proxy (http://host:port).
        timeout_s: for all of it.
        ready: want one that takes new requests; otherwise one that lives.
        ca_file: of an https proxy's authority; None: whatever certificate it shows is good enough, as for the probes of
            Kubernetes, because nothing secret is sent.

    Returns:
        Whether it is well, and what it is, for people.

    Raises:
        ConfigError: the address is none, or the file.
    """
    is_proxy = address.startswith(("http://", "https://"))
    tls = Credentials(ca_file=ca_file).tls() if is_proxy and ca_file is not None else False
    try:
        async with asyncio.timeout(timeout_s):
            return await (_ping_proxy(address, ready, tls) if is_proxy else _ping_worker(address, ready))
    except TimeoutError:
        return False, f"no answer within {timeout_s:g} s"


async def _ping_worker(address: str, ready: bool) -> tuple[bool, str]:
    dealer = Dealer(address)
    dealer.connect()
    with contextlib.closing(dealer):
        try:
            await dealer.send(Ping(sequence=1))
            message, _ = await dealer.receive()
        except (PeerGone, ProtocolError) as error:
            return False, str(error)
    if not isinstance(message, Pong):
        return False, f"answered with {type(message).__name__}"
    if message.is_stuck:
        return False, f"stuck: nothing has moved for {message.stalled_s:.1f} s"
    load = message.load
    told = f"{message.state.value}, {load.running} running, {load.waiting} waiting"
    return not ready or message.state is WorkerState.READY, told


async def _ping_proxy(url: str, ready: bool, tls: ssl.SSLContext | bool) -> tuple[bool, str]:
    async with httpx.AsyncClient(timeout=60, verify=tls) as client:  # the caller has a shorter deadline
        try:
            response = await client.get(url.rstrip("/") + ("/ready" if ready else "/livez"))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return False, str(error) or type(error).__name__
    return response.is_success, f"HTTP {response.status_code} {response.text[:500]}".rstrip()
