"""Conversations between their turns: what a store of them must do, and one in the memory of a process.

A **session** is a few bytes that one turn leaves for the next. A turn **begins** by taking the session for itself, and
ends with a **commit** of what is to be kept, or without, and then the session is what it was before. Who has it shows
a lease: a process that dies in the middle of a turn keeps nobody out for longer than that. A commit is refused once
somebody else has begun a turn, so that nothing is ever made of two turns.

Sessions vanish when nobody has touched them for a while, and the least recently used first where there are too many.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True)
class SessionKey:
    """Names a session."""

    owner: str
    """Whose it is; one owner never sees another's."""
    name: str


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """How many sessions are kept, and for how long."""

    ttl_s: float = 3600.0
    """Since the last turn."""
    max_sessions: int = 10_000
    """Of one owner."""
    max_bytes: int = 256 << 20
    """Of all sessions, where they are in the memory of this process."""


class SessionIsBusy(Exception):
    """A turn of the session is under way."""


class Hold(Enum):
    """What became of the session that a turn has taken."""

    HELD = auto()
    """Its lease is longer now."""
    STOP = auto()
    """The same, and somebody asked the turn to end."""
    LOST = auto()
    """Somebody else has it, or it was dropped."""


class SessionStore(ABC):
    """A store of sessions. All methods but `close` may raise `metastore.base.MetastoreError`.

    `holder` is a random word of the turn.
    """

    @abstractmethod
    async def begin(self, key: SessionKey, holder: str, lease_s: float) -> bytes | None:
        """Take a session for a turn.

        Returns:
            What the last turn left; None: there is no such session yet.

        Raises:
            SessionIsBusy: another turn has it.
        """

    @abstractmethod
    async def renew(self, key: SessionKey, holder: str, lease_s: float) -> Hold:
        """Go on holding a session."""

    @abstractmethod
    async def commit(self, key: SessionKey, holder: str, state: bytes | None) -> bool:
        """End a turn and leave `state`; None: the session is over.

        Returns:
            False, with nothing done, when the turn does not hold the session any more.
        """

    @abstractmethod
    async def release(self, key: SessionKey, holder: str) -> None:
        """End a turn that leaves nothing; the session is what it was before. Does nothing once it has ended."""

    @abstractmethod
    async def stop(self, key: SessionKey) -> bool:
        """Ask the turn that has a session to end its answer. Returns whether there is one."""

    @abstractmethod
    async def forget(self, key: SessionKey) -> bool:
        """Drop a session. Returns whether there was one.

        Raises:
            SessionIsBusy: a turn has it.
        """

    @abstractmethod
    async def close(self) -> None:
        """Drop what is held of other processes. Raises nothing."""


_ENTRY_BYTES = 512
"""What an entry takes besides its state."""


@dataclass
class _Entry:
    state: bytes | None = None
    expires: float = 0.0
    holder: str = ""
    leased_until: float = 0.0
    stop: bool = False

    @property
    def size(self) -> int:
        return _ENTRY_BYTES + len(self.state or b"")


class MemorySessionStore(SessionStore):
    """Sessions that this process alone knows. They end with it.

    Args:
        limits: see there.
        clock: seconds, never going back.
    """

    def __init__(self, limits: SessionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._entries: OrderedDict[SessionKey, _Entry] = OrderedDict()
        """The least recently used first."""
        self._of: dict[str, OrderedDict[SessionKey, None]] = {}
        """Owner → keys, in the same order."""
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def begin(self, key: SessionKey, holder: str, lease_s: float) -> bytes | None:
        """Implements `SessionStore`."""
        entry = self._live(key)
        if entry is not None and self._is_held(entry) and entry.holder != holder:
            raise SessionIsBusy
        if entry is None:
            entry = self._put(key, None)
        entry.holder, entry.leased_until, entry.stop = holder, self._clock() + lease_s, False
        return entry.state

    async def renew(self, key: SessionKey, holder: str, lease_s: float) -> Hold:
        """Implements `SessionStore`."""
        entry = self._entries.get(key)
        if entry is None or entry.holder != holder:
            return Hold.LOST
        entry.leased_until = self._clock() + lease_s
        return Hold.STOP if entry.stop else Hold.HELD

    async def commit(self, key: SessionKey, holder: str, state: bytes | None) -> bool:
        """Implements `SessionStore`."""
        entry = self._entries.get(key)
        if entry is None or entry.holder != holder:
            return False
        self._drop(key)
        if state is not None:
            self._put(key, state)
            self._make_room(key.owner)
        return True

    async def release(self, key: SessionKey, holder: str) -> None:
        """Implements `SessionStore`."""
        entry = self._entries.get(key)
        if entry is None or entry.holder != holder:
            return
        entry.holder, entry.leased_until, entry.stop = "", 0.0, False
        if entry.state is None:
            self._drop(key)

    async def stop(self, key: SessionKey) -> bool:
        """Implements `SessionStore`."""
        entry = self._live(key)
        if entry is None or not self._is_held(entry):
            return False
        entry.stop = True
        return True

    async def forget(self, key: SessionKey) -> bool:
        """Implements `SessionStore`."""
        entry = self._live(key)
        if entry is None:
            return False
        if self._is_held(entry):
            raise SessionIsBusy
        self._drop(key)
        return entry.state is not None

    async def close(self) -> None:
        """Implements `SessionStore`."""

    def _is_held(self, entry: _Entry) -> bool:
        return bool(entry.holder) and entry.leased_until > self._clock()

    def _live(self, key: SessionKey) -> _Entry | None:
        """The entry, unless its time is over."""
        entry = self._entries.get(key)
        if entry is not None and not self._is_held(entry) and entry.expires <= self._clock():
            self._drop(key)
            return None
        return entry

    def _put(self, key: SessionKey, state: bytes | None) -> _Entry:
        entry = _Entry(state, self._clock() + self._limits.ttl_s)
        self._entries[key] = entry
        self._of.setdefault(key.owner, OrderedDict())[key] = None
        self._bytes += entry.size
        return entry

    def _drop(self, key: SessionKey) -> None:
        self._bytes -= self._entries.pop(key).size
        del self._of[key.owner][key]
        if not self._of[key.owner]:
            del self._of[key.owner]

    def _make_room(self, owner: str) -> None:
        while (victim := self._victim(owner)) is not None:
            self._drop(victim)

    def _victim(self, owner: str) -> SessionKey | None:
        """What is to go: one of those that are too many, or that nobody has touched for long; none that a turn has."""
        mine = self._of.get(owner, OrderedDict())
        if len(mine) > self._limits.max_sessions:
            return self._first_idle(mine)
        oldest = self._first_idle(self._entries)
        if oldest is None:
            return None
        is_over = self._entries[oldest].expires <= self._clock()
        return oldest if is_over or self._bytes > self._limits.max_bytes else None

    def _first_idle(self, keys: Iterable[SessionKey]) -> SessionKey | None:
        return next((key for key in keys if not self._is_held(self._entries[key])), None)
