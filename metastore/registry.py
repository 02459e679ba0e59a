"""Both ends of a store: `Registration` keeps one process's record there, `RosterFeed` follows the records of all.

Neither holds anything up: they are tasks beside the work, and go on trying while the store can't be reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from epd.errors import ConfigError
from epd.messages import PROTOCOL_VERSION
from epd.transport import endpoint
from metastore.base import PROXY_ROLE, Event, Metastore, MetastoreError, Record
from metastore.roster import Member, Roster

log = logging.getLogger(__name__)

LEASE_S = 5.0
RENEW_INTERVAL_S = 1.0
SCAN_INTERVAL_S = 1.0
GRACE_S = 3.0
"""After the store was emptied, every worker has registered again by then."""
_RETRY_S = (0.2, 1.0)
"""Pauses while the store can't be reached: the first, and the longest."""
SOURCE = "metastore"
_REMEMBER_S = 60.0
"""For how long those that said goodbye are kept out: far longer than a message can be late."""
_GOODBYE_S = 2.0
"""A process that leaves does not wait longer for a store that is out of reach."""
_MAX_COMPLAINTS = 1000


class Reachability:
    """Logs when a store is lost and found, once each."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lost_at: float | None = None

    def lost(self, error: Exception) -> None:
        """Say so if it is news."""
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            log.warning("%s: out of reach, trying on: %s", self._what, error)

    def found(self) -> None:
        """Say so if it is news."""
        if self._lost_at is not None:
            log.info("%s: back after %.1f s", self._what, time.monotonic() - self._lost_at)
            self._lost_at = None


async def keep_trying(once: Callable[[], Awaitable[None]], reachability: Reachability) -> None:
    """Run `once` for ever; it returns or fails when it is time for the next."""
    pause_s = _RETRY_S[0]
    while True:
        try:
            await once()
            pause_s = _RETRY_S[0]
            continue
        except MetastoreError as error:
            reachability.lost(error)
        except Exception:  # the edge of this task: a bug must not end it for good
            log.exception("bug in the metastore or in what follows it")
        # Jitter: all processes of a cluster lose the store at the same time.
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, _RETRY_S[1])


class Registration:
    """Keeps the record of this process in the store from `run` to `leave`.

    Args:
        store: where.
        describe: the record as of now; its token is filled in here.
        address: of the store, for logs.
        lease_s: for how long a record stands without being renewed.
        interval_s: between renewals.
    """

    def __init__(
        self,
        store: Metastore,
        describe: Callable[[], Record],
        address: str,
        *,
        lease_s: float = LEASE_S,
        interval_s: float = RENEW_INTERVAL_S,
    ) -> None:
        self._store = store
        self._describe = describe
        self._lease_s, self._interval_s = lease_s, interval_s
        self._reachability = Reachability(f"metastore {address}")
        self._token: int | None = None
        self._is_superseded = False
        self._news = asyncio.Event()

    def tell(self) -> None:
        """Renew at once: the state has changed."""
        self._news.set()

    async def run(self) -> None:
        """Renew until cancelled."""
        await keep_trying(self._renew_and_wait, self._reachability)

    async def _renew_and_wait(self) -> None:
        self._news.clear()
        if self._token is None:
            self._token = await self._store.new_token()
        self._note(await self._store.put(self._record(self._token), self._lease_s))
        self._reachability.found()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval_s):
                await self._news.wait()

    def _record(self, token: int) -> Record:
        return msgspec.structs.replace(self._describe(), token=token)

    def _note(self, is_held: bool) -> None:
        if not is_held and not self._is_superseded:
            log.error("another process has registered the address %s after this one", self._describe().address)
        self._is_superseded = not is_held

    async def leave(self) -> None:
        """Take the record back, after `run` was cancelled."""
        if self._token is not None:
            with contextlib.suppress(MetastoreError, TimeoutError):  # then its lease ends by itself
                async with asyncio.timeout(_GOODBYE_S):
                    await self._store.delete(self._record(self._token))


@dataclass
class _Known:
    """What the feed knows of one record."""

    token: int
    """The largest that was seen."""
    member: Member | None
    """None: a proxy."""
    missing_since: float | None = None
    """When the store first answered without it; on the clock of the feed."""
    gone_at: float | None = None
    """When its process took it back; the token stays for a while, so that nothing late brings it in again."""


class RosterFeed:
    """Puts the store's workers into a roster.

    A worker leaves when it took its record back, and when its record is missing for a while although the store answers
    and the worker itself does not. A store that is silent is no evidence.

    Args:
        store: to follow.
        roster: to feed.
        address: of the store, for logs.
        is_up: whether there is a live connection to a member.
        scan_interval_s: between looks at the whole store.
        grace_s: for how long a record may be missing.
    """

    def __init__(
        self,
        store: Metastore,
        roster: Roster,
        address: str,
        is_up: Callable[[Member], bool],
        *,
        scan_interval_s: float = SCAN_INTERVAL_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.proxies: dict[str, Record] = {}
        """Name → record of the proxies that are registered, this one included."""
        self._store = store
        self._roster = roster
        self._is_up = is_up
        self._scan_interval_s, self._grace_s = scan_interval_s, grace_s
        self._scans = Reachability(f"metastore {address}")
        self._events = Reachability(f"events of metastore {address}")
        self._known: dict[str, _Known] = {}
        self._touched: set[str] = set()
        """Names that events told of since the last scan began, which knows less of them."""
        self._scan_now = asyncio.Event()
        self.was_read = asyncio.Event()
        """Set when all that the store held has been taken in once."""
        self._complaints: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to follow; needs a running event loop."""
        self._tasks = [
            asyncio.create_task(keep_trying(self._watch, self._events), name="metastore events"),
            asyncio.create_task(keep_trying(self._scan_and_wait, self._scans), name="metastore scans"),
        ]

    async def close(self) -> None:
        """Stop; the roster stays as it is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- events and scans ------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        await self._store.watch(self._subscribed, self._changed)
        raise MetastoreError("the events ended")

    def _subscribed(self) -> None:
        self._events.found()
        self._scan_now.set()  # for what happened before

    def _changed(self, event: Event) -> None:
        self._touched.add(event.name)
        if event.record is not None:
            self._put(event.record)
        elif event.name in self._known:
            self._gone(event.name, event.token)

    async def _scan_and_wait(self) -> None:
        self._scan_now.clear()
        self._touched.clear()
        try:
            records = await self._store.scan()
        except MetastoreError:
            for known in self._known.values():
                known.missing_since = None
            raise
        self._scans.found()
        for record in records:
            if record.name not in self._touched:
                self._put(record, is_current=True)
        self._judge({record.name for record in records} | self._touched)
        self.was_read.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._scan_interval_s):
                await self._scan_now.wait()

    # -- what they mean --------------------------------------------------------------------------------------------

    def _put(self, record: Record, *, is_current: bool = False) -> None:
        """Take a record in. `is_current`: the store holds it now, and so nothing that precedes it."""
        known = self._known.get(record.name)
        if known is not None and record.token <= known.token and known.gone_at is not None:
            return  # late words of one that has said goodbye, or of one before
        if known is not None and record.token < known.token and not is_current:
            return  # late words of one that was replaced
        try:
            member = _member(record)
        except ConfigError as error:
            self._complain(f"metastore: {record.name} is ignored: {error}")
            return
        self._known[record.name] = _Known(record.token, member)
        if member is None:
            self.proxies[record.name] = record
        else:
            self._roster.renew(
                member.role, member.address, float("inf"), source=SOURCE, worker=record.worker, load=record.load
            )

    def _gone(self, name: str, token: int | None) -> None:
        known = self._known[name]
        if token is None:
            if not self._is_alive(known):
                self._drop(name, known)
                del self._known[name]
        elif token >= known.token:
            self._drop(name, known)
            known.token, known.gone_at = token, time.monotonic()

    def _judge(self, present: set[str]) -> None:
        """Look at those that a whole scan did not find."""
        now = time.monotonic()
        for name, known in list(self._known.items()):
            if known.gone_at is not None:
                if now - known.gone_at > _REMEMBER_S:
                    del self._known[name]
            elif name in present:
                known.missing_since = None
            elif known.missing_since is None:
                known.missing_since = now
            elif now - known.missing_since >= self._grace_s and not self._is_alive(known):
                self._drop(name, known)
                del self._known[name]

    def _is_alive(self, known: _Known) -> bool:
        return known.member is not None and self._is_up(known.member)

    def _drop(self, name: str, known: _Known) -> None:
        if known.member is None:
            self.proxies.pop(name, None)
        else:
            self._roster.remove(known.member.role, known.member.address, source=SOURCE)

    def _complain(self, text: str) -> None:
        """Log once: records come every second."""
        if text not in self._complaints and len(self._complaints) < _MAX_COMPLAINTS:
            self._complaints.add(text)
            log.warning("%s", text)


def _member(record: Record) -> Member | None:
    """The worker that a record is about; None: a proxy.

    Raises:
        ConfigError: the record makes no sense.
    """
    if record.role == PROXY_ROLE:
        return None
    if record.worker is None or record.worker.role != record.role:
        raise ConfigError("its role is not the worker's")
    if record.protocol_version != PROTOCOL_VERSION:
        raise ConfigError(f"it speaks protocol {record.protocol_version}, not {PROTOCOL_VERSION}")
    return Member(record.worker.role, endpoint(record.address))
