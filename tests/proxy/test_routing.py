"""Choosing among candidates."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import pytest

from proxy.routing.policies import (
    AffinityPolicy,
    Candidate,
    LeastLoadedPolicy,
    Policy,
    PowerOfTwoPolicy,
    Question,
    RandomPolicy,
    RoundRobinPolicy,
    make_policy,
)
from proxy.routing.prefix_affinity import Chain, PrefixMap, prefix_chain


def candidates(*loads: int) -> list[Candidate]:
    return [Candidate(f"w{i}", load) for i, load in enumerate(loads)]


def test_round_robin_visits_all_in_turn() -> None:
    policy = RoundRobinPolicy()
    assert [policy.pick(candidates(5, 0, 9)).key for _ in range(4)] == ["w0", "w1", "w2", "w0"]


def test_round_robin_gives_each_model_its_own_turns() -> None:
    policy = RoundRobinPolicy()
    red, blue = candidates(0, 0), [Candidate("x0", 0), Candidate("x1", 0)]
    turns = [policy.pick(group).key for _ in range(3) for group in (red, blue)]
    assert turns == ["w0", "x0", "w1", "x1", "w0", "x0"]


def test_random_visits_all() -> None:
    policy = RandomPolicy(random.Random(0))
    assert {policy.pick(candidates(0, 0, 0)).key for _ in range(100)} == {"w0", "w1", "w2"}


def test_least_loaded_takes_turns_among_equals() -> None:
    policy = LeastLoadedPolicy()
    turns = [policy.pick(candidates(1, 0, 0)).key for _ in range(4)]
    assert turns in (["w1", "w2", "w1", "w2"], ["w2", "w1", "w2", "w1"])


def test_least_loaded_looks_at_when_the_work_would_be_done() -> None:
    slow, fast = Candidate("slow", 10.0, cost=300.0), Candidate("fast", 100.0, cost=50.0)
    assert LeastLoadedPolicy().pick([slow, fast]) is fast


def test_where_other_proxies_place_too_near_equals_are_drawn_and_others_not() -> None:
    policy = LeastLoadedPolicy(random.Random(0))
    drawn = {policy.pick(candidates(4, 5, 5, 7), Question(slack=1.0)).key for _ in range(50)}
    assert drawn == {"w0", "w1", "w2"}
    assert {policy.pick(candidates(4, 5, 5, 7)).key for _ in range(50)} == {"w0"}


def test_power_of_two_never_takes_the_worst_and_not_always_the_best() -> None:
    policy = PowerOfTwoPolicy(random.Random(0))
    assert {policy.pick(candidates(0, 1, 2)).key for _ in range(50)} == {"w0", "w1"}


@pytest.mark.parametrize("policy", [LeastLoadedPolicy(), AffinityPolicy(), PowerOfTwoPolicy()])
def test_a_worker_that_is_at_the_same_picture_gets_it_however_busy(policy: Policy) -> None:
    busy = Candidate("busy", 100, joins=True)
    assert policy.pick([Candidate("idle", 0), busy, Candidate("holder", 0, held=1)], Question("key")) is busy


def test_affinity_sticks_and_moves_little() -> None:
    policy = AffinityPolicy()
    keys = [f"key{i}" for i in range(300)]
    before = {key: policy.pick(candidates(0, 0, 0), Question(key)).key for key in keys}
    assert before == {key: policy.pick(list(reversed(candidates(0, 0, 0))), Question(key)).key for key in keys}
    assert min(Counter(before.values()).values()) > 60
    after = {key: policy.pick(candidates(0, 0, 0, 0), Question(key)).key for key in keys}
    moved = [key for key in keys if before[key] != after[key]]
    assert {after[key] for key in moved} == {"w3"}


def test_affinity_is_bounded_by_load() -> None:
    policy = AffinityPolicy()
    home = policy.pick(candidates(0, 0), Question("k")).key
    loads = [Candidate(name, 10 if name == home else 0) for name in ("w0", "w1")]
    assert policy.pick(loads, Question("k")).key != home


@pytest.mark.parametrize("name", ["random", "round_robin", "least_loaded", "power_of_two", "affinity"])
@pytest.mark.parametrize("loads", [(0,), (1000,), (3, 3, 3), (0, 1000)])
def test_every_policy_picks_somebody(name: str, loads: tuple[int, ...]) -> None:
    pool = candidates(*loads)
    assert make_policy(name).pick(pool, Question("key")) in pool


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
    assert {policy.pick(choice, Question(f"key{i}")).key for i in range(20)} == wanted


SYSTEM = list(range(1000, 1100))


def about(*turns: int) -> Question:
    """A prompt with the same system part and these turns, 40 tokens each."""
    chain = prefix_chain(SYSTEM + [turn for turn in turns for _ in range(40)])
    return Question(chain=lambda: chain)


def test_a_conversation_stays_where_its_prefix_is() -> None:
    policy = AffinityPolicy(random.Random(0))
    homes = {turn: policy.pick(candidates(0, 0, 0), about(turn)).key for turn in range(4)}
    for turn, home in homes.items():
        assert policy.pick(candidates(1, 1, 1), about(turn, 50)).key == home
        assert policy.pick(candidates(1, 1, 1), about(turn, 50, 51)).key == home


def test_a_prefix_is_computed_elsewhere_when_its_home_is_too_busy_and_then_there_are_two_homes() -> None:
    policy = AffinityPolicy(random.Random(0))
    home = policy.pick(candidates(0, 0, 0), about(1)).key
    busy = [Candidate(f"w{i}", 10 if f"w{i}" == home else 0) for i in range(3)]
    second = policy.pick(busy, about(1)).key
    assert second != home
    assert {policy.pick(candidates(1, 1, 1), about(1)).key for _ in range(10)} == {home, second}


def test_a_restarted_worker_has_lost_its_prefixes() -> None:
    policy = AffinityPolicy(random.Random(0))
    others = [Candidate("w1", 0.0, life="1"), Candidate("w2", 0.0, life="1")]
    policy.pick([Candidate("w0", 0.0, life="1")], about(7))
    assert policy.pick([Candidate("w0", 0.5, life="1"), *others], about(7)).key == "w0"
    first = policy.pick([Candidate("w0", 0.5, life="2"), *others], about(7)).key
    assert first == policy.pick([Candidate("w0", 0.5, life="3"), *others], about(7)).key


def test_proxies_agree_on_a_prefix_that_neither_has_seen() -> None:
    for turn in range(10):
        question = Question(chain=partial(prefix_chain, [turn] * 64))
        first, second = AffinityPolicy(random.Random(1)), AffinityPolicy(random.Random(2))
        assert first.pick(candidates(0, 0, 0), question).key == second.pick(candidates(0, 0, 0), question).key


def test_prompts_share_the_chain_of_what_they_share() -> None:
    def shared(first: Chain, second: Chain) -> int:
        return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))

    prompt = list(range(200))
    chain = prefix_chain(prompt, [(70, "a")])
    assert len(chain) == 200 // 32
    assert shared(chain, prefix_chain([*prompt[:150], 9999, *prompt[151:]], [(70, "a")])) == 4
    assert shared(chain, prefix_chain(prompt, [(70, "b")])) == 2
    assert shared(chain, prefix_chain(prompt, [(70, "a")], salt="another model")) == 0
    assert prefix_chain(prompt[:31]) == ()
    assert len(prefix_chain([1] * 1_000_000)) == 256


def test_what_is_remembered_of_prefixes_is_bounded() -> None:
    prefixes = PrefixMap(max_prefixes=10)
    chains = [prefix_chain([i] * 128) for i in range(5)]
    for chain in chains:
        prefixes.remember(chain, "w")
    assert len(prefixes) == 10
    assert prefixes.matches(chains[4], {"w"}) == {"w": 4}
    assert prefixes.matches(chains[0], {"w"}) == {}
