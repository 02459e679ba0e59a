"""Conversations that the server keeps: one turn at a time, whichever proxy it comes to.

    begin: take the session → prompt = its tokens + the new turn → answer → commit the tokens of both → the client hears
    the end

What is kept are token ids. Their KV is found again by prefix caching, or computed anew: where it lies is the workers'
matter. A turn that does not come to its end (the client leaves, a worker fails) leaves the session as it was.

While a turn is under way its task here keeps the session's lease alive, and learns from the store when another proxy
was asked to stop the answer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import msgspec

from epd.errors import SessionBusy, SessionsUnavailable
from metastore.base import MetastoreError
from metastore.sessions import Hold, SessionIsBusy, SessionKey, SessionStore
from proxy.dispatch.dispatcher import Dispatcher

log = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_S = 10.0
"""So long nobody else gets a session whose proxy died."""
_HEARTBEAT_S = 1.0
_STOP_POLL_S = 0.02
"""Between looks whether the answer that is to be stopped has begun."""
_BUSY = "Session {name} is being answered. Wait for the end of that answer, or stop it."
_LOST = "Session {name} was taken over by another request; this turn is not kept."
_UNAVAILABLE = "The sessions' store can't be reached. Try again in a moment."


class Conversation(msgspec.Struct, frozen=True):
    """What a session keeps between its turns."""

    model: str
    """Fingerprint of the checkpoint that the tokens belong to."""
    token_ids: tuple[int, ...]
    """All that was said, up to the last answer, without the token that ended it."""


class Turn:
    """A turn of a session that is under way. Made by `Sessions`."""

    def __init__(self, key: SessionKey, request_id: str, before: Conversation | None) -> None:
        self.key = key
        self.request_id = request_id
        self.before = before
        """What there was; None: nothing."""
        self.holder = secrets.token_hex(8)
        self.stop = asyncio.Event()
        """Somebody wants the answer to end."""
        self.is_kept = True
        """Whether there is a session that it leaves something for."""


class Sessions:
    """The sessions of all clients, as this proxy uses them.

    Args:
        store: of sessions.
        dispatcher: has the answers under way.
        lease_s: see `LEASE_S`.
        heartbeat_s: how often leases are renewed.
    """

    def __init__(
        self,
        store: SessionStore,
        dispatcher: Dispatcher,
        *,
        lease_s: float = LEASE_S,
        heartbeat_s: float = _HEARTBEAT_S,
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._turns: dict[SessionKey, set[Turn]] = {}
        self._endings: dict[SessionKey, asyncio.Task[None]] = {}
        """Turns that were not committed, and are just leaving their sessions."""

    @asynccontextmanager
    async def turn(self, key: SessionKey, request_id: str) -> AsyncIterator[Turn]:
        """Take a session for one turn. What is not committed by the end leaves it as it was.

        Args:
            key: of the session.
            request_id: of the work that makes the answer.

        Raises:
            SessionBusy: a turn of it is under way, here or elsewhere.
            SessionsUnavailable: there is no telling.
        """
        if key in self._endings:
            await asyncio.wait({self._endings[key]})
        turn = Turn(key, request_id, None)
        try:
            state = await self._ask(key, self._store.begin(key, turn.holder, self._lease_s))
            turn.before = _decode(key, state)
            async with self._watched(turn):
                yield turn
        finally:
            if turn.is_kept:
                # In a task of its own: this one may be cancelled.
                ending = asyncio.create_task(self._release(turn), name=f"release of session {key.name}")
                self._endings[key] = ending
                ending.add_done_callback(lambda task: self._ended(key, task))
                await asyncio.wait({ending})

    @asynccontextmanager
    async def alone(self, key: SessionKey, request_id: str) -> AsyncIterator[Turn]:
        """A turn that neither has a past nor leaves anything, so that any number of one key may run. It can be stopped
        here, by that key."""
        turn = Turn(key, request_id, None)
        turn.is_kept = False
        async with self._watched(turn):
            yield turn

    async def commit(self, turn: Turn, conversation: Conversation | None) -> None:
        """End a turn: the session becomes `conversation`; None ends it. Does nothing for a turn that is alone.

        Raises:
            SessionBusy: somebody else has the session meanwhile. It is theirs.
            SessionsUnavailable: the store did not answer.
        """
        if not turn.is_kept:
            return
        state = None if conversation is None else msgspec.msgpack.encode(conversation)
        # A client that leaves now has its turn kept: the answer is there.
        commit = asyncio.ensure_future(self._ask(turn.key, self._store.commit(turn.key, turn.holder, state)))
        try:
            is_done = await asyncio.shield(commit)
        except asyncio.CancelledError:
            await asyncio.gather(commit, return_exceptions=True)
            raise
        if not is_done:
            raise SessionBusy(_LOST.format(name=shown(turn.key)))
        turn.is_kept = False  # there is nothing left to give back

    async def forget(self, key: SessionKey) -> bool:
        """End a session. Returns whether there was one.

        Raises:
            SessionBusy: a turn of it is under way.
            SessionsUnavailable: there is no telling.
        """
        return await self._ask(key, self._store.forget(key))

    async def stop(self, key: SessionKey) -> bool:
        """End the answer that a session is getting, here or elsewhere. Returns whether there is one.

        Raises:
            SessionsUnavailable: there is none here, and no telling whether there is one elsewhere.
        """
        here = self._turns.get(key, set())
        for turn in here:
            turn.stop.set()
        return bool(here) or await self._ask(key, self._store.stop(key))

    @property
    def under_way(self) -> int:
        """Turns, those included that are just leaving their sessions."""
        return sum(map(len, self._turns.values())) + len(self._endings)

    async def close(self) -> None:
        """Let go of what is held."""
        if self._endings:
            await asyncio.wait(self._endings.values())
        await self._store.close()

    # -- while a turn is under way -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _watched(self, turn: Turn) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch(turn), name=f"turn of session {turn.key.name}")
        self._turns.setdefault(turn.key, set()).add(turn)
        try:
            yield
        finally:
            watch.cancel()
            self._turns[turn.key].discard(turn)
            if not self._turns[turn.key]:
                del self._turns[turn.key]

    async def _watch(self, turn: Turn) -> None:
        renewed = time.monotonic()
        while True:
            if not turn.stop.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._heartbeat_s if turn.is_kept else None):
                        await turn.stop.wait()
            elif await self._dispatcher.stop(turn.request_id):
                turn.stop.clear()
            else:
                await asyncio.sleep(_STOP_POLL_S)  # it is not with the workers yet
            if turn.is_kept and time.monotonic() >= renewed + self._heartbeat_s:
                renewed = time.monotonic()
                await self._renew(turn)

    async def _renew(self, turn: Turn) -> None:
        """Whether the session is still ours is for the commit to say."""
        try:
            if await self._store.renew(turn.key, turn.holder, self._lease_s) is Hold.STOP:
                turn.stop.set()
        except MetastoreError as error:
            log.warning("session %s: its lease was not renewed: %s", turn.key.name, error)

    async def _release(self, turn: Turn) -> None:
        try:
            await self._store.release(turn.key, turn.holder)
        except MetastoreError as error:
            log.warning("session %s stays taken for %g s: %s", turn.key.name, self._lease_s, error)

    def _ended(self, key: SessionKey, task: asyncio.Task[None]) -> None:
        if self._endings.get(key) is task:
            del self._endings[key]

    async def _ask(self, key: SessionKey, call: Awaitable[T]) -> T:
        try:
            return await call
        except SessionIsBusy:
            raise SessionBusy(_BUSY.format(name=shown(key))) from None
        except MetastoreError as error:
            log.warning("session %s: %s", key.name, error)
            raise SessionsUnavailable(_UNAVAILABLE) from error


def shown(key: SessionKey) -> str:
    """What clients call a session: for those who gave no id, the name has more behind it."""
    return key.name.partition("@")[0]


def _decode(key: SessionKey, state: bytes | None) -> Conversation | None:
    if state is None:
        return None
    try:
        return msgspec.msgpack.decode(state, type=Conversation)
    except msgspec.MsgspecError as error:
        log.warning("session %s can't be read, and begins anew: %s", key.name, error)
        return None
