"""What a worker has to do, told by made-up reports and requests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import pytest

from epd.messages import Load
from epd.types import WorkerRole
from metastore.roster import Member
from proxy.cluster.greeting import Identity
from proxy.cluster.worker_connection import WorkerConnection
from proxy.routing.placement import PictureSizes, Plan, snapshots
from proxy.routing.policies import LeastLoadedPolicy, Question, make_policy
from proxy.routing.work_ledger import WorkLedger


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> WorkLedger:
    return WorkLedger(is_serial=True, clock=clock)


def test_only_what_the_report_does_not_cover_is_added_to_it(ledger: WorkLedger) -> None:
    ledger.sent("old", units=1.0, sequence=3)
    ledger.sent("new", units=2.0, sequence=4)
    ledger.report(Load(running=3, work_ms=700.0, ms_per_unit=100.0), sequence=4)
    assert ledger.outstanding_ms() == pytest.approx(700 + 2 * 100)
    assert ledger.foreign == 2
    assert ledger.requests() == 2 + 2


def test_reported_work_shrinks_as_time_goes_by(ledger: WorkLedger, clock: Clock) -> None:
    ledger.report(Load(running=1, work_ms=300.0, ms_per_unit=100.0), sequence=1)
    clock.now += 0.2
    assert ledger.outstanding_ms() == pytest.approx(100)
    clock.now += 0.2
    assert ledger.outstanding_ms() == 0


def test_other_proxies_are_taken_to_place_as_much_as_this_one(ledger: WorkLedger) -> None:
    ledger.sent("old", units=1.0, sequence=0)
    ledger.report(Load(running=3, work_ms=300.0, ms_per_unit=100.0), sequence=1)
    ledger.sent("new", units=1.0, sequence=1)
    assert ledger.requests(rivals=3) == 3 + 3
    assert ledger.outstanding_ms(rivals=3) == pytest.approx(300 + 300)


@pytest.mark.parametrize(("seconds", "rate"), [(0.2, 200.0), (5.0, 400.0), (0.001, 25.0)])
def test_observed_times_correct_the_prediction_within_bounds(
    ledger: WorkLedger, clock: Clock, seconds: float, rate: float
) -> None:
    ledger.report(Load(ms_per_unit=100.0), sequence=1)
    ledger.sent("a", units=1.0, sequence=1)
    clock.now += seconds
    ledger.begun("a")
    ledger.ended("a")
    assert ledger.rate == pytest.approx(rate)


def test_what_came_from_a_cache_teaches_nothing(ledger: WorkLedger, clock: Clock) -> None:
    ledger.report(Load(ms_per_unit=100.0), sequence=1)
    ledger.sent("a", units=1.0, sequence=1)
    ledger.begun("a", units=0.0)
    assert ledger.rate == 100


def test_a_prompt_that_shared_its_steps_teaches_nothing(clock: Clock) -> None:
    ledger = WorkLedger(is_serial=False, clock=clock)
    ledger.report(Load(ms_per_unit=1.0), sequence=1)
    ledger.sent("first", units=100.0, sequence=1)
    ledger.sent("second", units=100.0, sequence=1)
    clock.now += 0.3
    ledger.begun("second")
    assert ledger.rate == 1
    ledger.begun("first")
    assert ledger.rate == pytest.approx(3)


def test_pictures_in_work_are_known_until_the_last_request_for_them_ends(ledger: WorkLedger) -> None:
    ledger.sent("a", units=1.0, sequence=0, content="picture")
    ledger.sent("b", units=0.0, sequence=0, content="picture")
    ledger.ended("a")
    assert ledger.has("picture")
    ledger.ended("b")
    assert not ledger.has("picture")


def workers(*loads: Load) -> dict[str, WorkerConnection]:
    found = {}
    for i, load in enumerate(loads):
        found[f"w{i}"] = WorkerConnection(
            Member(WorkerRole.ENCODER, f"w{i}"), Identity("test", lambda _: None), lambda _: ()
        )
        found[f"w{i}"].ledger.report(load, 1)
    return found


def test_loads_are_requests_until_every_worker_knows_its_speed() -> None:
    known, unknown = Load(running=1, work_ms=5000.0, ms_per_unit=100.0), Load(running=2)
    candidates, _ = snapshots(workers(known, unknown), (), 1.0, Plan())
    assert [one.load for one in candidates] == [1, 2]
    candidates, _ = snapshots(workers(known, Load(ms_per_unit=10.0)), (), 3.0, Plan())
    assert candidates[0].load > 4900
    assert [one.cost for one in candidates] == [300, 30]


def test_pictures_of_one_request_see_each_other() -> None:
    policy, plan = LeastLoadedPolicy(), Plan()
    pool = workers(Load(), Load(), Load(running=1))
    chosen = []
    for _ in range(5):
        candidates, slack = snapshots(pool, (), 1.0, plan)
        chosen.append(policy.pick(candidates, Question(slack=0 * slack)).key)
        plan.note(chosen[-1], 1.0)
    assert sorted(chosen) == ["w0", "w0", "w1", "w1", "w2"]


def test_a_picture_weighs_by_its_pixels_within_bounds() -> None:
    sizes = PictureSizes()
    assert sizes.units(1000) == 1
    sizes.note(1000)
    assert [sizes.units(pixels) for pixels in (1, 500, 2000, 10**9)] == [0.25, 0.5, 2, 4]


@pytest.mark.parametrize("load", [Load(ms_per_unit=float("inf")), Load(work_ms=float("nan")), Load(work_ms=-1e30)])
@pytest.mark.parametrize("policy", ["least_loaded", "power_of_two", "affinity"])
def test_a_worker_that_reports_nonsense_spoils_no_choice(load: Load, policy: str) -> None:
    workers = [
        WorkerConnection(Member(WorkerRole.ENCODER, f"w{i}"), Identity("test", lambda _: None), lambda _: ())
        for i in range(3)
    ]
    for worker in workers:
        worker.ledger.report(Load(running=1, work_ms=50.0, ms_per_unit=50.0), sequence=1)
    workers[0].ledger.report(load if load.ms_per_unit else msgspec.structs.replace(load, ms_per_unit=50.0), sequence=2)
    found, slack = snapshots({worker.member.address: worker for worker in workers}, (), 1.0, Plan())
    assert all(math.isfinite(one.load) and math.isfinite(one.cost) and one.load >= 0 for one in found)
    assert make_policy(policy).pick(found, Question("key", slack=slack)) in found
