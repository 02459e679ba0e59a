"""The workers that a proxy knows of, whichever ways it learned of them.

Each way is a source with an entry of its own: address lists put permanent ones in, announcements put them in with a
lease that each sign of life renews, stores such as Redis judge leases themselves. A worker is there while one source
says so. Readers see one roster, and events when it changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from epd.messages import Load, WorkerInfo
from epd.types import WorkerRole

LEASE_S = 5.0
"""Workers announce themselves every second; so many seconds of silence end a lease."""
LISTED = "list"
ANNOUNCED = "announcement"


@dataclass(frozen=True)
class Member:
    """A worker that should exist. Whether it answers is for the connection to find out."""

    role: WorkerRole
    address: str
    """ZeroMQ endpoint."""


Listener = Callable[[Member], None]


@dataclass
class _Standing:
    """What is known of one member."""

    expiry: dict[str, float] = field(default_factory=dict)
    """Source → until when it vouches for the member."""
    worker: WorkerInfo | None = None
    load: Load | None = None


class Roster:
    """Members with leases. Not thread-safe: one event loop owns it.

    Args:
        clock: seconds, monotonic; tests put their own in.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._standing: dict[Member, _Standing] = {}
        self._joined: list[Listener] = []
        self._left: list[Listener] = []
        self._changed: list[Listener] = []

    def subscribe(self, joined: Listener, left: Listener, changed: Listener | None = None) -> None:
        """Call these on changes, and `joined` now for each member that is there already.

        Args:
            joined: some source knows the member, and none did before.
            left: no source knows it any more.
            changed: it is in another state, or another incarnation of it is there: see `worker`.
        """
        self._joined.append(joined)
        self._left.append(left)
        if changed is not None:
            self._changed.append(changed)
        for member in self.members():
            joined(member)

    def add_permanent(self, role: WorkerRole, address: str) -> None:
        """Put in a member of an address list; it never leaves."""
        self.renew(role, address, float("inf"), source=LISTED)

    def renew(
        self,
        role: WorkerRole,
        address: str,
        lease_s: float = LEASE_S,
        *,
        source: str = ANNOUNCED,
        worker: WorkerInfo | None = None,
        load: Load | None = None,
    ) -> None:
        """Put in a member, or prolong its lease with this source.

        Args:
            role: of the worker.
            address: ZeroMQ endpoint.
            lease_s: seconds; infinite: until `remove`.
            source: who says so.
            worker: what the worker says of itself, if the source knows.
            load: how busy it is, if the source knows.
        """
        member = Member(role, address)
        standing = self._standing.get(member)
        is_new = standing is None
        if standing is None:
            standing = self._standing[member] = _Standing()
        standing.expiry[source] = self._clock() + lease_s
        before, standing.worker = standing.worker, worker or standing.worker
        standing.load = load or standing.load
        if is_new:
            _tell(self._joined, member)
        elif before is not None and worker is not None and _identity(before) != _identity(worker):
            _tell(self._changed, member)

    def remove(self, role: WorkerRole, address: str, *, source: str = ANNOUNCED) -> None:
        """This source does not know the member any more; it stays while another one does."""
        member = Member(role, address)
        standing = self._standing.get(member)
        if standing is not None and standing.expiry.pop(source, None) is not None:
            self._drop_if_unknown(member)

    def expire(self) -> None:
        """Drop members whose leases are all over. Call it about once a second."""
        now = self._clock()
        for member, standing in list(self._standing.items()):
            standing.expiry = {source: expiry for source, expiry in standing.expiry.items() if expiry >= now}
            self._drop_if_unknown(member)

    def members(self, role: WorkerRole | None = None) -> list[Member]:
        """All members, or those of one role, in the order in which they joined."""
        return [member for member in self._standing if role in (None, member.role)]

    def worker(self, member: Member) -> WorkerInfo | None:
        """What the member last said of itself to one of its sources; None: it is known by its address alone."""
        standing = self._standing.get(member)
        return None if standing is None else standing.worker

    def load(self, member: Member) -> Load | None:
        """How busy the member last said it is to one of its sources; None: it told none."""
        standing = self._standing.get(member)
        return None if standing is None else standing.load

    def sources(self, member: Member) -> tuple[str, ...]:
        """Who knows the member."""
        standing = self._standing.get(member)
        return () if standing is None else tuple(standing.expiry)

    def _drop_if_unknown(self, member: Member) -> None:
        if not self._standing[member].expiry:
            del self._standing[member]
            _tell(self._left, member)


def _identity(worker: WorkerInfo) -> tuple[str, str]:
    return worker.incarnation, worker.state


def _tell(listeners: list[Listener], member: Member) -> None:
    for listener in listeners:
        listener(member)
