"""How a worker is chosen among the live ones. Policies see snapshots and own no connection.

    random         any
    round_robin    one after the other
    least_loaded   where the work would be done first: least predicted milliseconds, or fewest requests while workers
                   have not learned their speed
    power_of_two   the less loaded of two drawn at random
    affinity       the same picture to the same encoder, and prompts that begin alike to the same prefill-decode
                   worker, which have it in their caches, unless that one is too busy

All but the first two look first for workers that have the request's pictures: an encoder that is at one now, or has
encoded it; a PD that holds them and is not too busy.

Affinity is rendezvous hashing: each worker's rank for a key is a hash of both, so that a worker that joins or leaves
moves only its own share of the keys, and all proxies agree without talking. Where prompts went is remembered on top
(`prefix_affinity`). It is bounded: the first in rank order whose load is under `BOUND` times the mean.

Several proxies read the same reports of load at the same time (`work_ledger`). Workers whose loads are within
what the others may have changed meanwhile count as equal, and of equals two are drawn, the better one taken.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from proxy.routing.prefix_affinity import Chain, PrefixMap

BOUND = 1.5
"""Affinity prefers a worker up to so many times the mean load."""
_MAX_TURNS = 1 << 12
"""Workers whose turns are remembered, some of which may have left."""
HOLDER_SLACK = 4
"""A worker that holds the picture is worth waiting behind so many more requests: they share its steps."""


class Candidate(msgspec.Struct, frozen=True):
    """A worker that could take the work. `load` and `cost` are in the same unit, milliseconds or requests."""

    key: str
    """Its address."""
    load: float
    """Work at hand, as far as this proxy knows."""
    held: int = 0
    """Pictures of the work that it should hold."""
    cost: float = 1.0
    """What the work would add there."""
    joins: bool = False
    """It is at the very same picture now, so that the work adds nothing."""
    life: str = ""
    """Its incarnation: one that was restarted has lost its caches."""

    @property
    def done(self) -> float:
        """Load with the work on top."""
        return self.load + self.cost


class Question(msgspec.Struct, frozen=True):
    """What a policy is asked."""

    key: str = ""
    """What the work is about, such as a content key; empty: nothing that other work could share."""
    chain: Callable[[], Chain] = tuple
    """Gives the chain of a prompt (`proxy.routing.prefix_affinity`), for policies that look at it."""
    slack: float = 0.0
    """Differences in load, in shares of the work's cost, that mean nothing, since other proxies place work too."""


_ANY = Question()


class Policy(Protocol):
    """Chooses one of several candidates."""

    learns: bool
    """Whether it should hear of choices that are none, too."""

    def pick(self, candidates: Sequence[Candidate], question: Question = _ANY) -> Candidate:
        """One of `candidates`, which is not empty."""


class RandomPolicy:
    """Any worker."""

    learns = False

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source or random.Random()

    def pick(self, candidates: Sequence[Candidate], question: Question = _ANY) -> Candidate:
        """A uniform draw."""
        return self._random.choice(candidates)


class RoundRobinPolicy:
    """One worker after the other: who had no turn for longest.

    A mere count of turns would not do: requests of two models that come alternately would each see every second
    number, and so the same worker every time.

    Args:
        start: proxies that begin together should not begin with the same one.
    """

    learns = False

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._turns: OrderedDict[str, None] = OrderedDict()
        """Addresses, the latest last."""

    def pick(self, candidates: Sequence[Candidate], question: Question = _ANY) -> Candidate:
        """The one that waited longest; those that never had a turn come first, in the order of addresses."""
        fresh = sorted((one for one in candidates if one.key not in self._turns), key=lambda one: one.key)
        if fresh:
            chosen = fresh[self._start % len(fresh)]
        else:
            able = {candidate.key: candidate for candidate in candidates}
            chosen = able[next(key for key in self._turns if key in able)]
        self._turns[chosen.key] = None
        self._turns.move_to_end(chosen.key)
        if len(self._turns) > _MAX_TURNS:
            self._turns.popitem(last=False)
        return chosen


class LeastLoadedPolicy:
    """Where the work would be done first; equal ones take turns, or are drawn when other proxies choose too."""

    learns = False

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source or random.Random()
        self._ties = RoundRobinPolicy(self._random.randrange(1 << 16))

    def pick(self, candidates: Sequence[Candidate], question: Question = _ANY) -> Candidate:
        """One of the least loaded."""
        candidates = _joined(candidates) or _holders(candidates) or candidates
        least = min(candidate.done for candidate in candidates)
        cost = sum(candidate.cost for candidate in candidates) / len(candidates)
        near = [candidate for candidate in candidates if candidate.done <= least + question.slack * cost]
        if question.slack and len(near) > 1:
            return min(self._random.sample(near, 2), key=lambda candidate: candidate.done)
        return self._ties.pick(near)


class PowerOfTwoPolicy:
    """The less loaded of two drawn at random (https://doi.org/10.1109/71.963420)."""

    learns = False

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source or random.Random()

    def pick(self, candidates: Sequence[Candidate], question: Question = _ANY) -> Candidate:
        """The better one of two."""
        candidates = _joined(candidates) or _holders(candidates) or candidates
        drawn = self._random.sample(candidates, min(2, len(candidates)))
        return min(drawn, key=lambda candidate: candidate.done)


class AffinityPolicy:
    """The same key, or the same beginning of a prompt, to the same worker, bounded by load."""

    learns = True

    def __init__(self, source: random.Random | None = None) -> None:
        self._prefixes = PrefixMap()
        self._least_loaded = LeastLoadedPolicy(source)

    def pick(self, candidates: Sequence[Candidate], question: Question = _ANY) -> Candidate:
        """Who has most of it in its caches and is not too busy, else the first such in the key's rank order."""
        chain = question.chain()
        chosen = self._choose(candidates, question, chain)
        self._prefixes.remember(chain, _home(chosen))
        return chosen

    def _choose(self, candidates: Sequence[Candidate], question: Question, chain: Chain) -> Candidate:
        if joined := _joined(candidates):
            return self._least_loaded.pick(joined, question)
        bound = _bound(candidates)
        able = _holders(candidates) or [candidate for candidate in candidates if candidate.load < bound]
        matches = self._prefixes.matches(chain, {_home(candidate) for candidate in able})
        if matches:
            longest = max(matches.values())
            return self._least_loaded.pick([one for one in able if matches.get(_home(one)) == longest], question)
        key = question.key or (str(chain[0]) if chain else "")
        if not key:
            return self._least_loaded.pick(able, question)
        return min(able, key=lambda candidate: _rank(key, candidate.key))


def _home(candidate: Candidate) -> str:
    return f"{candidate.key} {candidate.life}"


def _bound(candidates: Sequence[Candidate]) -> float:
    """The load from which a worker is too busy. With the cost of the work to place, somebody is always under it."""
    cost = max(candidate.cost for candidate in candidates) or 1.0
    return BOUND * (sum(candidate.load for candidate in candidates) + cost) / len(candidates)


def _joined(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.joins]


def _holders(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that hold most of the work's pictures, of the ones that hold any and are not too busy."""
    bound = _bound(candidates)
    able = [one for one in candidates if one.held and one.load < bound + HOLDER_SLACK * one.cost]
    most = max((candidate.held for candidate in able), default=0)
    return [candidate for candidate in able if candidate.held == most]


def _rank(key: str, worker: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{worker}".encode(), digest_size=8).digest()


_POLICIES: dict[str, type[Policy]] = {
    "random": RandomPolicy,
    "round_robin": RoundRobinPolicy,
    "least_loaded": LeastLoadedPolicy,
    "power_of_two": PowerOfTwoPolicy,
    "affinity": AffinityPolicy,
}


def make_policy(name: str) -> Policy:
    """The policy of that name, as in `--encoder-router` and `--pd-router`."""
    return RoundRobinPolicy(random.randrange(1 << 16)) if name == "round_robin" else _POLICIES[name]()
