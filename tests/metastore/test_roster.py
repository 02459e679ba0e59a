from __future__ import annotations

import pytest

from epd.types import WorkerRole
from metastore.roster import Member, Roster

PD = Member(WorkerRole.PREFILL_DECODE, "ipc:///pd")
ENCODER = Member(WorkerRole.ENCODER, "ipc:///e")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(clock: Clock) -> Roster:
    return Roster(clock)


def record(roster: Roster) -> list[tuple[str, Member]]:
    events: list[tuple[str, Member]] = []
    roster.subscribe(lambda m: events.append(("joined", m)), lambda m: events.append(("left", m)))
    return events


def test_members_join_once_and_are_listed_by_role(roster: Roster) -> None:
    events = record(roster)
    roster.add_permanent(*_args(PD))
    roster.renew(*_args(ENCODER))
    roster.renew(*_args(ENCODER))
    assert events == [("joined", PD), ("joined", ENCODER)]
    assert roster.members() == [PD, ENCODER]
    assert roster.members(WorkerRole.ENCODER) == [ENCODER]


def test_a_late_subscriber_hears_of_those_who_are_there(roster: Roster) -> None:
    roster.add_permanent(*_args(PD))
    assert record(roster) == [("joined", PD)]


def test_a_lease_ends_unless_renewed(roster: Roster, clock: Clock) -> None:
    events = record(roster)
    roster.renew(*_args(ENCODER), lease_s=5)
    clock.now += 4
    roster.renew(*_args(ENCODER), lease_s=5)
    clock.now += 4
    roster.expire()
    assert roster.members() == [ENCODER]
    clock.now += 2
    roster.expire()
    assert events == [("joined", ENCODER), ("left", ENCODER)]


def test_permanent_members_stay(roster: Roster, clock: Clock) -> None:
    roster.add_permanent(*_args(PD))
    roster.renew(*_args(PD), lease_s=1)
    clock.now += 100
    roster.expire()
    roster.remove(*_args(PD))
    assert roster.members() == [PD]


def test_goodbye_removes_at_once(roster: Roster) -> None:
    events = record(roster)
    roster.renew(*_args(ENCODER))
    roster.remove(*_args(ENCODER))
    roster.remove(*_args(ENCODER))
    assert events[-1] == ("left", ENCODER)
    assert roster.members() == []


def _args(member: Member) -> tuple[WorkerRole, str]:
    return member.role, member.address
