"""Who has the last word over an address: the process that came last."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from epd.messages import PROTOCOL_VERSION
from epd.types import WorkerState
from metastore.base import Metastore, Record
from tests.metastore.conftest import Hosts, until
from tests.redis_server import RedisServer

NEVER_S = 3600.0


async def record(store: Metastore, incarnation: str) -> Record:
    token = await store.new_token()
    return Record(
        role="proxy", address="http://p", incarnation=incarnation, token=token, protocol_version=PROTOCOL_VERSION
    )


async def test_what_an_older_process_says_late_is_refused(hosts: Hosts) -> None:
    store = hosts.store()
    old, new = await record(store, "old"), await record(store, "new")
    assert await store.put(old, 60)
    assert await store.put(new, 60)
    assert not await store.put(old, 60)
    assert not await store.delete(old)
    assert [one.incarnation for one in await store.scan()] == ["new"]
    assert await store.delete(new)
    assert await store.scan() == []


async def test_tokens_grow_although_redis_was_emptied(hosts: Hosts, redis: RedisServer) -> None:
    store = hosts.store()
    old = await record(store, "old")
    await asyncio.to_thread(redis.restart)
    new = await record(store, "new")
    assert new.token > old.token
    assert await store.put(old, 60)  # it came first, into an empty store
    assert await store.put(new, 60)
    assert not await store.put(old, 60)


async def test_a_worker_that_comes_back_on_its_address_is_another_one(hosts: Hosts) -> None:
    roster, _, events = hosts.feed(scan_interval_s=NEVER_S)
    old = hosts.worker(incarnation="old")
    await until(roster.members)
    await old.die()
    new = hosts.worker(incarnation="new")
    await until(lambda: (info := roster.worker(new.member)) and info.incarnation == "new")
    await old.registration.leave()  # its goodbye comes late
    zombie = asyncio.create_task(old.registration.run())  # and so does its heart
    await new.drain()
    await until(lambda: (info := roster.worker(new.member)) and info.state is WorkerState.DRAINING)
    zombie.cancel()
    assert events == ["joined ipc:///pd", "changed ipc:///pd", "changed ipc:///pd"]


async def test_a_store_whose_clock_was_set_back_keeps_nobody_out(hosts: Hosts, redis: RedisServer) -> None:
    roster, _, _ = hosts.feed(scan_interval_s=0.02, grace_s=NEVER_S)
    worker = hosts.worker(incarnation="old")
    await until(roster.members)
    await worker.die()
    store = hosts.store()
    [before] = await store.scan()
    assert before.worker is not None
    await asyncio.to_thread(redis.flush)  # its lease is over
    info = msgspec.structs.replace(before.worker, incarnation="new")
    assert await store.put(msgspec.structs.replace(before, worker=info, token=before.token - 60_000_000), 60)
    await until(lambda: (found := roster.worker(worker.member)) and found.incarnation == "new")


async def test_late_events_do_not_bring_back_what_said_goodbye(hosts: Hosts) -> None:
    roster, feed, events = hosts.feed(scan_interval_s=0.02)
    worker = hosts.worker()
    await until(roster.members)
    [known] = await hosts.store().scan()
    await worker.leave()
    await until(lambda: not roster.members())
    await hosts.store().put(known, 60)  # as if it had been under way
    probe = hosts.worker("ipc:///probe")
    await until(lambda: roster.members() == [probe.member])
    assert events == ["joined ipc:///pd", "left ipc:///pd", "joined ipc:///probe"]
    assert feed.proxies == {}


async def test_two_processes_under_one_address_are_told(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    hosts.worker(incarnation="a", interval_s=0.02)
    store = hosts.store()
    async with asyncio.timeout(20):
        while not await store.scan():
            await asyncio.sleep(0.01)
    hosts.worker(incarnation="b")
    await until(lambda: any("has registered the address ipc:///pd" in line for line in caplog.messages))


async def test_records_that_make_no_sense_cost_nobody_else(
    hosts: Hosts, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    worker = hosts.worker()
    store = hosts.store()
    good = msgspec.structs.replace(worker.record(), token=1)
    for key, value in {
        "garbage": b"\xff{",
        "pd:nonsense": msgspec.structs.replace(good, address="nonsense").encode(),
        "pd:ipc:///stolen": good.encode(),
        "encoder:ipc:///x": msgspec.structs.replace(good, role="encoder", address="ipc:///x").encode(),
        "pd:ipc:///newer": msgspec.structs.replace(good, address="ipc:///newer", protocol_version=99).encode(),
    }.items():
        await asyncio.to_thread(redis.run, "SET", f"epd:member:{key}", value.decode("latin-1"))
    await asyncio.to_thread(redis.run, "LPUSH", "epd:member:pd:ipc:///list", "1")
    await asyncio.to_thread(redis.run, "PUBLISH", "epd:events", "nonsense")
    roster, _, _ = hosts.feed(store, scan_interval_s=0.02)
    await until(lambda: roster.members() == [worker.member])
    told = "\n".join(caplog.messages)
    for name in ("garbage", "pd:nonsense", "pd:ipc:///stolen", "encoder:ipc:///x", "protocol 99"):
        assert name in told
