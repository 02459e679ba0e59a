"""Choosing among candidates."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from proxy.routing import (
    AffinityPolicy,
    Candidate,
    LeastLoadedPolicy,
    Policy,
    RandomPolicy,
    RoundRobinPolicy,
    make_policy,
)


def candidates(*loads: int) -> list[Candidate]:
    return [Candidate(f"w{i}", load) for i, load in enumerate(loads)]


def test_round_robin_visits_all_in_turn() -> None:
    policy = RoundRobinPolicy()
    assert [policy.pick(candidates(5, 0, 9)).key for _ in range(4)] == ["w0", "w1", "w2", "w0"]


def test_random_visits_all() -> None:
    policy = RandomPolicy(random.Random(0))
    assert {policy.pick(candidates(0, 0, 0)).key for _ in range(100)} == {"w0", "w1", "w2"}


def test_least_loaded_takes_turns_among_equals() -> None:
    policy = LeastLoadedPolicy()
    assert [policy.pick(candidates(1, 0, 0)).key for _ in range(4)] == ["w1", "w2", "w1", "w2"]


def test_affinity_sticks_and_moves_little() -> None:
    policy = AffinityPolicy()
    keys = [f"key{i}" for i in range(300)]
    before = {key: policy.pick(candidates(0, 0, 0), key).key for key in keys}
    assert before == {key: policy.pick(list(reversed(candidates(0, 0, 0))), key).key for key in keys}
    assert min(Counter(before.values()).values()) > 60
    after = {key: policy.pick(candidates(0, 0, 0, 0), key).key for key in keys}
    moved = [key for key in keys if before[key] != after[key]]
    assert {after[key] for key in moved} == {"w3"}


def test_affinity_is_bounded_by_load() -> None:
    policy = AffinityPolicy()
    home = policy.pick(candidates(0, 0), "k").key
    loads = [Candidate(name, 10 if name == home else 0) for name in ("w0", "w1")]
    assert policy.pick(loads, "k").key != home


@pytest.mark.parametrize("name", ["random", "round_robin", "least_loaded", "affinity"])
@pytest.mark.parametrize("loads", [(0,), (1000,), (3, 3, 3), (0, 1000)])
def test_every_policy_picks_somebody(name: str, loads: tuple[int, ...]) -> None:
    pool = candidates(*loads)
    assert make_policy(name).pick(pool, "key") in pool


@pytest.mark.parametrize("policy", [LeastLoadedPolicy(), AffinityPolicy()])
@pytest.mark.parametrize(
    ("loads", "held", "wanted"),
    [
        ((0, 0, 0), (0, 1, 0), {"w1"}),
        ((0, 1, 0), (0, 1, 0), {"w1"}),
        ((0, 0, 0), (1, 2, 0), {"w1"}),
        ((0, 12, 1), (1, 2, 0), {"w0"}),  # it holds less, and is not too busy
        ((0, 9, 0), (0, 1, 0), {"w0", "w2"}),
    ],
)
def test_holders_of_the_pictures_are_preferred_while_load_allows(
    policy: Policy, loads: tuple[int, ...], held: tuple[int, ...], wanted: set[str]
) -> None:
    choice = [Candidate(f"w{i}", load, count) for i, (load, count) in enumerate(zip(loads, held, strict=True))]
    assert {policy.pick(choice, f"key{i}").key for i in range(20)} == wanted
