"""The workers that a proxy knows of, whichever way it learned of them.

Address lists put permanent members in; announcements, and stores such as Redis, put members in with a lease that each
sign of life renews. Readers see one roster, and events when it changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from epd.types import WorkerRole

LEASE_S = 5.0
"""Workers announce themselves every second; so many seconds of silence end a lease."""


@dataclass(frozen=True)
class Member:
    """A worker that should exist. Whether it answers is for the connection to find out."""

    role: WorkerRole
    address: str
    """ZeroMQ endpoint."""


Listener = Callable[[Member], None]


class Roster:
    """Members with leases. Not thread-safe: one event loop owns it.

    Args:
        clock: seconds, monotonic; tests put their own in.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._expiry: dict[Member, float] = {}
        self._joined: list[Listener] = []
        self._left: list[Listener] = []

    def subscribe(self, joined: Listener, left: Listener) -> None:
        """Call `joined` and `left` on changes, and `joined` now for each member that is there already."""
        self._joined.append(joined)
        self._left.append(left)
        for member in self.members():
            joined(member)

    def add_permanent(self, role: WorkerRole, address: str) -> None:
        """Put in a member of an address list; it never leaves."""
        self._put(Member(role, address), float("inf"))

    def renew(self, role: WorkerRole, address: str, lease_s: float = LEASE_S) -> None:
        """Put in a member, or prolong its lease; a permanent one stays permanent."""
        self._put(Member(role, address), self._clock() + lease_s)

    def remove(self, role: WorkerRole, address: str) -> None:
        """Take out a member that said goodbye; permanent ones stay."""
        member = Member(role, address)
        if self._expiry.get(member, float("inf")) < float("inf"):
            self._drop(member)

    def expire(self) -> None:
        """Drop members whose lease is over. Call it about once a second."""
        now = self._clock()
        for member in [member for member, expiry in self._expiry.items() if expiry < now]:
            self._drop(member)

    def members(self, role: WorkerRole | None = None) -> list[Member]:
        """All members, or those of one role, in the order in which they joined."""
        return [member for member in self._expiry if role in (None, member.role)]

    def _put(self, member: Member, expiry: float) -> None:
        is_new = member not in self._expiry
        self._expiry[member] = max(expiry, self._expiry.get(member, expiry))
        if is_new:
            for listener in self._joined:
                listener(member)

    def _drop(self, member: Member) -> None:
        del self._expiry[member]
        for listener in self._left:
            listener(member)
