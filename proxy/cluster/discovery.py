"""A proxy and the metastore: workers are found there, and the proxy itself is listed for people to see."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from epd.addresses import advertised, host_of
from epd.errors import ConfigError
from epd.messages import PROTOCOL_VERSION
from metastore.base import PROXY_ROLE, Record
from metastore.config import MetastoreConfig
from metastore.connect import make_metastore
from metastore.registry import Registration, RosterFeed
from metastore.roster import Member, Roster
from metastore.sessions import SessionLimits, SessionStore

log = logging.getLogger(__name__)


class Discovery:
    """Feeds a roster from a store between `start` and `close`.

    Args:
        config: of the store.
        roster: to feed.
        is_up: whether there is a live connection to a member.

    Raises:
        ConfigError: the store's client or address is none.
    """

    def __init__(self, config: MetastoreConfig, roster: Roster, is_up: Callable[[Member], bool]) -> None:
        self._config = config
        self._store = make_metastore(config)
        self.feed = RosterFeed(self._store, roster, config.safe_address, is_up)
        self._registration: Registration | None = None
        self._registering: asyncio.Task[None] | None = None

    def sessions(self, limits: SessionLimits) -> SessionStore | None:
        """Where the store keeps sessions; None: it does not."""
        return self._store.sessions(limits)

    def start(self) -> None:
        """Begin to follow the store; needs a running event loop, and waits for nothing."""
        self.feed.start()

    def register(self, host: str, port: int) -> None:
        """List this proxy as serving HTTP there; once, after `start`."""
        bound = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        towards = [store] if (store := host_of(self._config.first_server)) else []
        try:
            url = advertised(bound, None, towards).replace("tcp://", "http://")
        except ConfigError as error:
            log.warning("not listed in the metastore: %s", error)
            return
        incarnation, started = secrets.token_hex(8), time.monotonic()

        def describe() -> Record:
            return Record(
                role=PROXY_ROLE,
                address=url,
                incarnation=incarnation,
                protocol_version=PROTOCOL_VERSION,
                uptime_s=round(time.monotonic() - started, 3),
            )

        self._registration = Registration(self._store, describe, self._config.safe_address)
        self._registering = asyncio.create_task(self._registration.run(), name="metastore registration")

    async def leave(self) -> None:
        """Take this proxy off the list, and go on following the store. A second call does nothing."""
        registration, self._registration = self._registration, None
        if registration is not None and self._registering is not None:
            self._registering.cancel()
            await asyncio.gather(self._registering, return_exceptions=True)
            await registration.leave()

    async def close(self) -> None:
        """Stop following, take this proxy off the list, disconnect."""
        await self.feed.close()
        await self.leave()
        await self._store.close()
