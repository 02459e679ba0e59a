"""Workers come and go through a real Redis."""

from __future__ import annotations

import asyncio
import json

import pytest

from epd.config import ProxyConfig
from epd.demo import CHECKPOINT_DIR
from epd.types import WorkerState
from metastore.base import MetastoreError
from proxy.service import Service
from tests.metastore.conftest import Hosts, until
from tests.redis_server import RedisServer

NEVER_S = 3600.0


async def test_joins_changes_and_leaves_arrive_as_events(hosts: Hosts) -> None:
    roster, _, events = hosts.feed(scan_interval_s=NEVER_S)
    other, _, others_events = hosts.feed(scan_interval_s=NEVER_S)
    early = hosts.worker("ipc:///early")
    await until(lambda: roster.members() and other.members())
    worker = hosts.worker("ipc:///late")
    await until(lambda: len(roster.members()) == len(other.members()) == 2)
    await worker.drain()
    await until(lambda: (info := roster.worker(worker.member)) and info.state is WorkerState.DRAINING)
    await worker.leave()
    expected = ["joined ipc:///early", "joined ipc:///late", "changed ipc:///late", "left ipc:///late"]
    await until(lambda: events == others_events == expected)
    assert roster.members() == [early.member]


async def test_what_is_there_already_is_found(hosts: Hosts) -> None:
    worker = hosts.worker(interval_s=NEVER_S, lease_s=NEVER_S)
    store = hosts.store()
    async with asyncio.timeout(20):
        while not await store.scan():
            await asyncio.sleep(0.01)
    roster, _, _ = hosts.feed(scan_interval_s=NEVER_S)
    await until(lambda: roster.members() == [worker.member])


async def test_scans_do_where_events_do_not_come(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    store = hosts.store()

    async def watch(*_: object) -> None:
        raise MetastoreError("no events today")

    monkeypatch.setattr(store, "watch", watch)
    roster, _, events = hosts.feed(store, scan_interval_s=0.02, grace_s=0.05)
    worker = hosts.worker()
    await until(lambda: roster.members() == [worker.member])
    await worker.leave()
    await until(lambda: events == ["joined ipc:///pd", "left ipc:///pd"])


async def test_a_worker_that_died_leaves_with_its_lease(hosts: Hosts) -> None:
    roster, _, events = hosts.feed(scan_interval_s=0.02, grace_s=0.1)
    worker = hosts.worker(lease_s=0.6, interval_s=0.05)
    await until(roster.members)
    await worker.die()
    await until(lambda: events == ["joined ipc:///pd", "left ipc:///pd"])


async def test_workers_register_again_in_a_redis_that_was_emptied(hosts: Hosts, redis: RedisServer) -> None:
    roster, _, events = hosts.feed()
    workers = [hosts.worker(f"ipc:///{i}") for i in range(3)]
    await until(lambda: len(roster.members()) == 3)
    store = hosts.store()
    for wipe in (redis.flush, redis.restart):
        await asyncio.to_thread(wipe)
        async with asyncio.timeout(20):
            while len(await store.scan()) < 3:
                await asyncio.sleep(0.02)
    assert len(events) == 3
    assert all(not worker.task.done() for worker in workers)


async def test_a_proxy_that_drains_is_off_the_list_before_its_last_answer(hosts: Hosts) -> None:
    config = json.dumps({"metastore_address": hosts.url})
    service = Service(ProxyConfig(model=CHECKPOINT_DIR, metastore_client_config=config))
    await service.start()
    assert service.discovery is not None
    service.discovery.register("127.0.0.1", 5580)
    store = hosts.store()

    async def listed(names: list[str]) -> None:
        async with asyncio.timeout(20):
            while [record.name for record in await store.scan()] != names:
                await asyncio.sleep(0.01)

    await listed(["proxy:http://127.0.0.1:5580"])
    with service.dispatcher.admit():
        draining = asyncio.create_task(service.drain())
        await listed([])
        assert not draining.done()
    await draining
    await service.close()
