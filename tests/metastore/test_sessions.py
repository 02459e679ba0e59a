"""Sessions between their turns: Redis and the memory of a process keep the same promises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from metastore.base import MetastoreError
from metastore.redis_sessions import RedisSessionStore
from metastore.sessions import Hold, MemorySessionStore, SessionIsBusy, SessionKey, SessionLimits, SessionStore
from tests.metastore.conftest import Hosts, until
from tests.redis_server import RedisServer

KEY = SessionKey("anonymous", "7")
LEASE_S = 60.0
STATE = bytes(range(256))

MakeStore = Callable[..., SessionStore]


class Contract:
    """What every store does. `make` gives the store, or another view of the same one, with limits."""

    async def test_a_session_from_turn_to_turn(self, make: MakeStore) -> None:
        store = make()
        assert await store.begin(KEY, "a", LEASE_S) is None
        assert await store.commit(KEY, "a", STATE)
        assert await store.begin(KEY, "b", LEASE_S) == STATE
        assert await store.commit(KEY, "b", b"next")
        assert await store.begin(KEY, "c", LEASE_S) == b"next"
        assert await store.commit(KEY, "c", None)
        assert await store.begin(KEY, "d", LEASE_S) is None

    async def test_two_turns_at_once(self, make: MakeStore) -> None:
        store = make()
        await store.begin(KEY, "a", LEASE_S)
        with pytest.raises(SessionIsBusy):
            await store.begin(KEY, "b", LEASE_S)
        with pytest.raises(SessionIsBusy):
            await store.forget(KEY)
        for other in (SessionKey("anonymous", "8"), SessionKey("key", "7")):
            assert await store.begin(other, "b", LEASE_S) is None
        assert not await store.commit(KEY, "b", b"theirs")
        assert await store.commit(KEY, "a", b"mine")
        assert not await store.commit(KEY, "b", b"theirs")
        assert await store.begin(KEY, "c", LEASE_S) == b"mine"

    async def test_a_turn_that_leaves_nothing(self, make: MakeStore) -> None:
        store = make()
        await store.begin(KEY, "a", LEASE_S)
        await store.release(KEY, "a")
        assert await store.begin(KEY, "b", LEASE_S) is None
        await store.commit(KEY, "b", STATE)
        await store.begin(KEY, "c", LEASE_S)
        await store.release(KEY, "b")  # late
        with pytest.raises(SessionIsBusy):
            await store.begin(KEY, "d", LEASE_S)
        await store.release(KEY, "c")
        assert await store.begin(KEY, "d", LEASE_S) == STATE

    async def test_a_turn_whose_process_died(self, make: MakeStore) -> None:
        store = make()
        await store.begin(KEY, "first", LEASE_S)
        await store.commit(KEY, "first", STATE)
        await store.begin(KEY, "dead", 0.05)
        found: list[bytes | None] = []
        async with asyncio.timeout(20):
            while not found:
                try:
                    found.append(await store.begin(KEY, "heir", LEASE_S))
                except SessionIsBusy:
                    await asyncio.sleep(0.005)
        assert found == [STATE]
        assert await store.renew(KEY, "dead", LEASE_S) is Hold.LOST
        assert not await store.commit(KEY, "dead", b"too late")
        assert await store.renew(KEY, "heir", LEASE_S) is Hold.HELD
        assert await store.commit(KEY, "heir", b"heir")

    async def test_a_lease_that_ran_out_with_nobody_waiting_harms_nothing(self, make: MakeStore) -> None:
        store = make()
        await store.begin(KEY, "slow", LEASE_S)
        await store.commit(KEY, "slow", STATE)
        await store.begin(KEY, "slow", 0.001)
        await asyncio.sleep(0.01)
        assert await store.renew(KEY, "slow", LEASE_S) is Hold.HELD
        assert await store.commit(KEY, "slow", b"done")

    async def test_a_first_turn_whose_lease_ran_out_is_kept_unless_another_has_begun(self, make: MakeStore) -> None:
        store = make()
        other = SessionKey(KEY.owner, "8")
        for key in (KEY, other):
            await store.begin(key, "slow", 0.001)
        await asyncio.sleep(0.01)
        assert not await store.stop(KEY)  # looks at it, as others do
        assert await store.renew(KEY, "slow", 0.001) is Hold.HELD
        assert await store.begin(other, "heir", LEASE_S) is None
        await asyncio.sleep(0.01)
        assert await store.commit(KEY, "slow", b"done")
        assert await store.renew(other, "slow", LEASE_S) is Hold.LOST
        assert not await store.commit(other, "slow", b"too late")
        assert await store.begin(KEY, "next", LEASE_S) == b"done"

    async def test_a_turn_is_asked_to_stop(self, make: MakeStore) -> None:
        store = make()
        assert not await store.stop(KEY)
        await store.begin(KEY, "a", LEASE_S)
        assert await store.renew(KEY, "a", LEASE_S) is Hold.HELD
        assert await store.stop(KEY)
        assert await store.renew(KEY, "a", LEASE_S) is Hold.STOP
        await store.commit(KEY, "a", STATE)
        assert not await store.stop(KEY)
        await store.begin(KEY, "b", LEASE_S)
        assert await store.renew(KEY, "b", LEASE_S) is Hold.HELD

    async def test_forgetting(self, make: MakeStore) -> None:
        store = make()
        assert not await store.forget(KEY)
        await store.begin(KEY, "a", LEASE_S)
        await store.commit(KEY, "a", STATE)
        assert await store.forget(KEY)
        assert not await store.forget(KEY)
        assert await store.begin(KEY, "b", LEASE_S) is None

    async def test_the_least_recently_used_goes_first(self, make: MakeStore) -> None:
        store = make(max_sessions=2)
        for name in ("old", "used", "old-of-another"):
            key = SessionKey("another" if name.endswith("another") else "one", name)
            await store.begin(key, name, LEASE_S)
            await store.commit(key, name, STATE)
            await asyncio.sleep(0.002)  # Redis orders by milliseconds
        await store.begin(SessionKey("one", "used"), "a", LEASE_S)
        await store.commit(SessionKey("one", "used"), "a", STATE)
        await asyncio.sleep(0.002)
        await store.begin(SessionKey("one", "new"), "a", LEASE_S)
        await store.commit(SessionKey("one", "new"), "a", STATE)
        assert not await store.forget(SessionKey("one", "old"))
        for key in (SessionKey("one", "used"), SessionKey("one", "new"), SessionKey("another", "old-of-another")):
            assert await store.forget(key)

    async def test_what_a_turn_has_is_not_dropped(self, make: MakeStore) -> None:
        store = make(max_sessions=1)
        await store.begin(KEY, "a", LEASE_S)
        await store.commit(KEY, "a", STATE)
        await store.begin(KEY, "a", LEASE_S)
        other = SessionKey(KEY.owner, "other")
        await store.begin(other, "b", LEASE_S)
        await store.commit(other, "b", STATE)
        assert await store.renew(KEY, "a", LEASE_S) is Hold.HELD
        assert await store.commit(KEY, "a", b"kept")
        assert await store.begin(KEY, "c", LEASE_S) == b"kept"

    async def test_sessions_expire(self, make: MakeStore) -> None:
        store = make(ttl_s=0.02)
        await store.begin(KEY, "a", LEASE_S)
        await store.commit(KEY, "a", STATE)
        async with asyncio.timeout(20):
            while await store.begin(KEY, "b", 0.001) is not None:
                await store.release(KEY, "b")
                await asyncio.sleep(0.005)


class TestMemory(Contract):
    @pytest.fixture
    def make(self) -> MakeStore:
        return lambda **limits: MemorySessionStore(SessionLimits(**limits))

    async def test_bytes_are_bounded(self) -> None:
        store = MemorySessionStore(SessionLimits(max_bytes=10_000))
        for name in "abcdefgh":
            await store.begin(SessionKey("one", name), "x", LEASE_S)
            await store.commit(SessionKey("one", name), "x", bytes(4000))
        assert len(store) == 2
        assert await store.forget(SessionKey("one", "h"))
        assert not await store.forget(SessionKey("one", "a"))

    async def test_turns_of_dead_holders_do_not_pile_up(self) -> None:
        now = 0.0
        store = MemorySessionStore(SessionLimits(ttl_s=1.5), lambda: now)
        for name in map(str, range(100)):
            await store.begin(SessionKey("one", name), "x", 1)
        now = 2.0
        await store.begin(KEY, "y", 1)
        await store.commit(KEY, "y", STATE)
        assert len(store) == 1


class TestRedis(Contract):
    @pytest.fixture
    async def make(self, hosts: Hosts) -> MakeStore:
        def make(**limits: Any) -> SessionStore:
            store = hosts.store().sessions(SessionLimits(**limits))
            assert isinstance(store, RedisSessionStore)
            return store

        return make

    async def test_two_proxies_share_it(self, make: MakeStore) -> None:
        one, other = make(), make()
        await one.begin(KEY, "a", LEASE_S)
        with pytest.raises(SessionIsBusy):
            await other.begin(KEY, "b", LEASE_S)
        assert await other.stop(KEY)
        assert await one.renew(KEY, "a", LEASE_S) is Hold.STOP
        await one.commit(KEY, "a", STATE)
        assert await other.begin(KEY, "b", LEASE_S) == STATE

    async def test_a_commit_whose_answer_was_lost_is_sent_again(self, make: MakeStore) -> None:
        store = make()
        for state in (STATE, None):
            await store.begin(KEY, "a", LEASE_S)
            assert await store.commit(KEY, "a", state)
            assert await store.commit(KEY, "a", state)
        await store.begin(KEY, "a", LEASE_S)
        await store.commit(KEY, "a", STATE)
        await store.begin(KEY, "b", LEASE_S)
        assert not await store.commit(KEY, "a", STATE)

    async def test_nothing_stays_behind(self, make: MakeStore, redis: RedisServer) -> None:
        store = make(ttl_s=0.05)
        for holder in "ab":
            await store.begin(KEY, holder, 0.05)
            await store.commit(KEY, holder, STATE)
        await store.begin(SessionKey("one", "died"), "c", 0.05)
        assert redis.run("DBSIZE") not in ("0", "(integer) 0")
        await until(lambda: redis.run("DBSIZE") in ("0", "(integer) 0"))

    async def test_redis_is_gone(self, make: MakeStore, redis: RedisServer) -> None:
        store = make()
        await asyncio.to_thread(redis.kill)
        with pytest.raises(MetastoreError):
            await store.begin(KEY, "a", LEASE_S)
