"""Several proxies that read the same stale reports of the same workers, simulated: nobody's queue runs away."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from epd.messages import Load
from epd.types import WorkerRole
from metastore.roster import Member
from proxy.cluster.greeting import Identity
from proxy.cluster.worker_connection import WorkerConnection
from proxy.routing.placement import Plan, snapshots
from proxy.routing.policies import Policy, Question, make_policy
from proxy.routing.work_ledger import WorkLedger

WORKERS, PROXIES = 4, 3
SERVICE_S, REPORT_S, STEP_S, DURATION_S = 0.04, 0.5, 0.005, 30.0
LOAD = 0.85
"""Share of the workers' capacity that is asked for."""


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class SimulatedWorker:
    """Does one after the other."""

    queue: list[tuple[SimulatedProxy, int]] = field(default_factory=list)
    progress: float = 0.0

    def work(self, address: str, seconds: float) -> None:
        self.progress = self.progress + seconds if self.queue else 0.0
        while self.queue and self.progress >= SERVICE_S:
            self.progress -= SERVICE_S
            proxy, number = self.queue.pop(0)
            proxy.workers[address].ledger.ended(number)

    def report(self, with_ms: bool) -> Load:
        waiting = len(self.queue)
        if not with_ms:
            return Load(waiting=waiting)
        ms = SERVICE_S * 1000
        return Load(waiting=waiting, work_ms=ms * waiting - self.progress * 1000, ms_per_unit=ms)


class SimulatedProxy:
    """The real ledgers, snapshots and policy; only the connections carry nothing."""

    def __init__(self, policy: Policy, clock: Clock) -> None:
        self.policy = policy
        self.workers: dict[str, WorkerConnection] = {}
        self.pings = self.requests = 0
        for i in range(WORKERS):
            connection = WorkerConnection(
                Member(WorkerRole.ENCODER, f"w{i}"), Identity("test", lambda _: None), lambda _: ()
            )
            connection.ledger = WorkLedger(is_serial=True, clock=clock)
            self.workers[f"w{i}"] = connection

    def hear(self, loads: dict[str, Load]) -> None:
        self.pings += 1
        for address, load in loads.items():
            self.workers[address].ledger.report(load, self.pings)

    def place(self, workers: dict[str, SimulatedWorker]) -> None:
        candidates, slack = snapshots(self.workers, (), 1.0, Plan())
        address = self.policy.pick(candidates, Question(slack=slack)).key
        self.requests += 1
        self.workers[address].ledger.sent(self.requests, units=1.0, sequence=self.pings)
        workers[address].queue.append((self, self.requests))


def longest_queues(name: str, *, with_ms: bool) -> Iterator[int]:
    """The longest queue, in requests, at each step of a simulation, once it has run in."""
    clock, source = Clock(), random.Random(7)
    random.seed(7)
    proxies = [SimulatedProxy(make_policy(name), clock) for _ in range(PROXIES)]
    workers = {f"w{i}": SimulatedWorker() for i in range(WORKERS)}
    rate = LOAD * WORKERS / SERVICE_S
    next_report, next_arrival = 0.0, 0.0
    while clock.now < DURATION_S:
        clock.now += STEP_S
        for address, worker in workers.items():
            worker.work(address, STEP_S)
        if clock.now >= next_report:  # all hear it at the same moment, which is the worst case
            next_report += REPORT_S
            loads = {address: worker.report(with_ms) for address, worker in workers.items()}
            for proxy in proxies:
                proxy.hear(loads)
        while clock.now >= next_arrival:
            next_arrival += source.expovariate(rate)
            source.choice(proxies).place(workers)
        if clock.now > 5:
            yield max(len(worker.queue) for worker in workers.values())


@pytest.mark.parametrize("with_ms", [False, True], ids=["requests", "milliseconds"])
@pytest.mark.parametrize("name", ["least_loaded", "power_of_two", "affinity"])
def test_proxies_do_not_herd(name: str, with_ms: bool) -> None:
    """A proxy that forgets that others place too makes the longest queue 10 requests on average, and 23 at times."""
    queues = list(longest_queues(name, with_ms=with_ms))
    assert sum(queues) / len(queues) < 4
    assert max(queues) <= 12
