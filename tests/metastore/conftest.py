from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from epd.messages import PROTOCOL_VERSION, Load, WorkerInfo
from epd.types import WorkerRole, WorkerState
from metastore.base import Metastore, Record
from metastore.config import MetastoreConfig
from metastore.connect import make_metastore
from metastore.registry import Registration, RosterFeed
from metastore.roster import Member, Roster
from tests.redis_server import RedisServer, redis_server

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for the tests of a module."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    """Running and empty, whatever the test before did to it."""
    if shared_redis.popen is None or shared_redis.popen.poll() is not None:
        shared_redis.start()
    shared_redis.flush()
    return shared_redis


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds: for states that announce themselves to nobody."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.002)


class FakeWorker:
    """What a worker registers: its state and load may change, and it may die without a word."""

    def __init__(self, store: Metastore, address: str, incarnation: str = "1", **timing: float) -> None:
        self.member = Member(WorkerRole.PREFILL_DECODE, address)
        self.state = WorkerState.READY
        self.load = Load()
        self._incarnation = incarnation
        self.registration = Registration(store, self.record, "test", **timing)
        self.task = asyncio.create_task(self.registration.run())

    def record(self) -> Record:
        worker = WorkerInfo(
            role=self.member.role,
            address=self.member.address,
            incarnation=self._incarnation,
            model="m",
            dtype="float32",
            state=self.state,
        )
        return Record(
            role=worker.role,
            address=worker.address,
            incarnation=worker.incarnation,
            protocol_version=PROTOCOL_VERSION,
            worker=worker,
            load=self.load,
        )

    async def drain(self) -> None:
        self.state = WorkerState.DRAINING
        self.registration.tell()

    async def die(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def leave(self) -> None:
        await self.die()
        await self.registration.leave()


class Hosts:
    """Stores, workers and feeds of one test, closed at its end."""

    def __init__(self, stack: AsyncExitStack, url: str) -> None:
        self._stack = stack
        self.url = url
        self.up: set[Member] = set()
        """Members that feeds take for connected."""

    def store(self, **fields: Any) -> Metastore:
        settings: dict[str, Any] = {"address": self.url, "socket_timeout": 1.0} | fields
        store = make_metastore(MetastoreConfig(**settings))
        self._stack.push_async_callback(store.close)
        return store

    def worker(self, address: str = "ipc:///pd", incarnation: str = "1", **timing: float) -> FakeWorker:
        worker = FakeWorker(self.store(), address, incarnation, **timing)
        self._stack.push_async_callback(worker.die)
        return worker

    def feed(self, store: Metastore | None = None, **timing: float) -> tuple[Roster, RosterFeed, list[str]]:
        """A roster that follows the store, its feed, and what happened in it so far."""
        roster, events = Roster(), list[str]()

        def note(what: str) -> Callable[[Member], None]:
            return lambda member: events.append(f"{what} {member.address}")

        roster.subscribe(note("joined"), note("left"), note("changed"))
        feed = RosterFeed(store or self.store(), roster, "test", self.up.__contains__, **timing)
        feed.start()
        self._stack.push_async_callback(feed.close)
        return roster, feed, events


@pytest.fixture
async def hosts(redis: RedisServer) -> AsyncIterator[Hosts]:
    async with AsyncExitStack() as stack:
        yield Hosts(stack, redis.url)
