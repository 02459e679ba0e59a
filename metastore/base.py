"""What a store of registrations must do. Redis does it; another store can, as a class of its own.

A **record** says that a worker (or a proxy) is there. It has one key and a lease: unless it is put again, it vanishes
when its time is over. Its **token** fences: a store gives each process a larger one than those before it, and what a
process with a smaller token says about a key is ignored while one with a larger token holds it. So a worker that comes
back on its address has the last word over what it was before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import msgspec

from epd.messages import Load, WorkerInfo
from metastore.config import MetastoreConfig
from metastore.sessions import SessionLimits, SessionStore

PROXY_ROLE = "proxy"
"""`Record.role` of proxies; that of workers is the value of their `WorkerRole`."""


class MetastoreError(Exception):
    """The store can't be reached, or refuses. The message is for logs and has no password."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the cluster, as it stands in the store in JSON. Unknown fields are ignored."""

    role: str
    address: str
    """ZeroMQ endpoint of a worker, URL of a proxy."""
    incarnation: str
    """Random per start."""
    protocol_version: int
    token: int = 0
    """Of this incarnation, see above; 0: none yet."""
    worker: WorkerInfo | None = None
    """All that a worker says of itself, with its state; None for proxies."""
    load: Load = Load()
    uptime_s: float = 0.0

    @property
    def name(self) -> str:
        """What tells it from all others; the end of its key."""
        return f"{self.role}:{self.address}"

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(data: bytes) -> Record:
        """From JSON.

        Raises:
            msgspec.MsgspecError: it is no record.
        """
        return msgspec.json.decode(data, type=Record)


@dataclass(frozen=True)
class Event:
    """A record was put, or has gone."""

    name: str
    record: Record | None = None
    """None: it has gone."""
    token: int | None = None
    """Of one that has gone because its process took it back; None: its lease is over."""


class Metastore(ABC):
    """A store. Constructors do no I/O; every method ends within a few socket timeouts.

    All methods may raise `MetastoreError`, after which they can be called again.
    """

    @classmethod
    @abstractmethod
    def from_config(cls, config: MetastoreConfig) -> Self:
        """A store at this address.

        Raises:
            ConfigError: the address is none.
        """

    @abstractmethod
    async def new_token(self) -> int:
        """Larger than all before, by the store's own clock; survives that the store is emptied."""

    @abstractmethod
    async def put(self, record: Record, ttl_s: float) -> bool:
        """Store a record for `ttl_s` seconds, at once, and tell the watchers.

        Returns:
            False, with nothing done, when a larger token holds its place.
        """

    @abstractmethod
    async def delete(self, record: Record) -> bool:
        """Take a record back and tell the watchers.

        Returns:
            False, with nothing done, when a larger token holds its place.
        """

    @abstractmethod
    async def scan(self) -> list[Record]:
        """All records whose lease runs. What can't be read is left out, and logged once."""

    @abstractmethod
    async def watch(self, subscribed: Callable[[], None], changed: Callable[[Event], None]) -> None:
        """Call `changed` for each event until the connection is lost, which raises.

        `subscribed` is called when events begin to come, and again whenever some may have been missed.
        """

    def sessions(self, limits: SessionLimits) -> SessionStore | None:
        """Where proxies keep conversations between their turns; None: not here, so that each keeps its own."""
        return None

    @abstractmethod
    async def close(self) -> None:
        """Drop all connections. Raises nothing."""
