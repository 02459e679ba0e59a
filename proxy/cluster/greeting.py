"""How the proxy introduces itself to a worker, and which ones it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from epd.messages import PROTOCOL_VERSION, AnyMessage, Hello, Refusal, Welcome, WorkerInfo
from epd.transport import Dealer, HandshakeFailed, PeerGone, ProtocolError
from metastore.roster import Member

GREETING_S = 2.0
"""For the answer to a greeting."""
CONNECT_RETRY_S = 0.05
CONNECT_ATTEMPTS = 40
NOBODY = "nobody listens there yet"


@dataclass(frozen=True)
class Identity:
    """How this proxy introduces itself."""

    name: str
    refuse: Callable[[WorkerInfo], str | None]
    """Why it can't use a worker, by what that says of itself; None: it can."""


class Refused(Exception):
    """The worker and this proxy do not fit together."""


async def greet(dealer: Dealer, member: Member, identity: Identity) -> WorkerInfo:
    """Say hello on a new connection; returns what the worker says of itself.

    Raises:
        PeerGone: nobody answers.
        Refused: it is no worker for this proxy, or does not want it.
    """
    hello = Hello(protocol_version=PROTOCOL_VERSION, sender=identity.name, model="")  # any
    await _send_when_connected(dealer, hello)
    try:
        async with asyncio.timeout(GREETING_S):
            message, _ = await dealer.receive()
    except TimeoutError:
        raise PeerGone(f"no answer to the greeting within {GREETING_S:g} s") from None
    except ProtocolError as error:
        raise Refused(f"its greeting is malformed: {error}") from error
    return _checked(message, member, identity)


def _checked(message: AnyMessage, member: Member, identity: Identity) -> WorkerInfo:
    if isinstance(message, Refusal):
        raise Refused(message.reason)
    if not isinstance(message, Welcome):
        raise Refused(f"it answered the greeting with {type(message).__name__}")
    worker = message.worker
    if message.protocol_version != PROTOCOL_VERSION:
        raise Refused(f"it speaks protocol {message.protocol_version}, this proxy {PROTOCOL_VERSION}")
    if worker.role is not member.role:
        raise Refused(f"it is a {worker.role.value} worker, not {member.role.value}")
    if reason := identity.refuse(worker):
        raise Refused(reason)
    return worker


async def _send_when_connected(dealer: Dealer, hello: Hello) -> None:
    """Try every now and then: nobody is there yet, and libzmq goes on connecting."""
    for _ in range(CONNECT_ATTEMPTS):
        try:
            await dealer.send(hello, timeout_s=0)
        except HandshakeFailed:
            raise
        except PeerGone:
            await asyncio.sleep(CONNECT_RETRY_S)
        else:
            return
    # A connection that was made and lost meanwhile is of no use any more; begin with a new one.
    raise PeerGone(NOBODY)
