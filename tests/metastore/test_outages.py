"""Redis dies, stalls and comes back; nobody is dropped for that."""

from __future__ import annotations

import asyncio

import pytest

from tests.metastore.conftest import Hosts, until
from tests.redis_server import RedisServer


async def test_a_redis_that_is_gone_is_no_evidence(
    hosts: Hosts, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    roster, _, events = hosts.feed(scan_interval_s=0.02, grace_s=3.0)
    worker = hosts.worker(lease_s=0.5, interval_s=0.1)
    await until(roster.members)
    await asyncio.to_thread(redis.kill)
    await until(lambda: sum("out of reach" in line for line in caplog.messages) >= 3)
    await asyncio.sleep(1.0)  # twice the lease, which is over then wherever anybody counts it
    assert events == ["joined ipc:///pd"]
    await asyncio.to_thread(redis.start)
    await until(lambda: sum("back after" in line for line in caplog.messages) >= 3)
    store = hosts.store()
    async with asyncio.timeout(20):
        while not await store.scan():
            await asyncio.sleep(0.02)
    assert events == ["joined ipc:///pd"]
    assert not worker.task.done()
    assert sum("out of reach" in line for line in caplog.messages) == 3  # told once by each, not every second


async def test_a_redis_that_stalls_is_noticed_and_holds_nobody_up(
    hosts: Hosts, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = hosts.store(socket_timeout=0.1)
    roster, _, events = hosts.feed(store, scan_interval_s=0.02)
    worker = hosts.worker()
    await until(roster.members)
    redis.pause()
    try:
        told = ("events of metastore", "metastore test")
        await until(lambda: all(any(line.startswith(start) for line in caplog.messages) for start in told))
        await asyncio.wait_for(worker.leave(), 10)  # it can't say goodbye, and does not wait for long
    finally:
        redis.resume()
    assert events == ["joined ipc:///pd"]


async def test_a_worker_that_is_connected_stays_without_a_lease(hosts: Hosts) -> None:
    roster, _, events = hosts.feed(scan_interval_s=0.02, grace_s=0.05)
    cut_off, dead = (hosts.worker(f"ipc:///{name}", lease_s=0.6, interval_s=0.05) for name in ("cut-off", "dead"))
    await until(lambda: len(roster.members()) == 2)
    hosts.up.add(cut_off.member)
    for worker in (cut_off, dead):
        await worker.die()
    await until(lambda: roster.members() == [cut_off.member])
    hosts.up.clear()
    await until(lambda: not roster.members())
    assert events[2:] == ["left ipc:///dead", "left ipc:///cut-off"]


async def test_a_redis_that_comes_later_is_waited_for(
    hosts: Hosts, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(redis.kill)
    roster, _, _ = hosts.feed()
    worker = hosts.worker()
    await until(lambda: sum("out of reach" in line for line in caplog.messages) >= 3)
    await asyncio.to_thread(redis.start)
    await until(lambda: roster.members() == [worker.member])


@pytest.mark.parametrize("steps", range(0, 16, 3))
async def test_a_registration_ends_when_it_is_cancelled(hosts: Hosts, steps: int) -> None:
    worker = hosts.worker()
    store = hosts.store()
    async with asyncio.timeout(20):
        while not await store.scan():
            await asyncio.sleep(0.01)
    worker.registration.tell()
    for _ in range(steps):  # wherever it is just now
        await asyncio.sleep(0)
    await asyncio.wait_for(worker.leave(), 10)
    assert await store.scan() == []
