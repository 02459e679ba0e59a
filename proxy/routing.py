"""How a worker is chosen among the live ones. Policies see snapshots and own no connection.

    random         any
    round_robin    one after the other
    least_loaded   fewest requests at hand; ties go round
    affinity       the same picture to the same worker, which has it in its cache, unless that one is too busy

The last two first look for PDs that hold the request's pictures already and are not too busy.

Affinity is rendezvous hashing: each worker's rank for a key is a hash of both, so that a worker that joins or leaves
moves only its own share of the keys. It is bounded: the first in rank order whose load is under `BOUND` times the mean.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

BOUND = 1.5
"""Affinity prefers a worker up to so many times the mean load."""
HOLDER_SLACK = 4
"""A PD that holds the picture is worth waiting behind so many more requests: they share its steps."""


@dataclass(frozen=True)
class Candidate:
    """A worker that could take the work."""

    key: str
    """Its address."""
    load: int
    """Requests that it has at hand, as far as this proxy knows."""
    held: int = 0
    """Pictures of the work that it should hold."""


class Policy(Protocol):
    """Chooses one of several candidates."""

    def pick(self, candidates: Sequence[Candidate], key: str = "") -> Candidate:
        """One of `candidates`, which is not empty. `key`: what the work is about, such as a content key."""


class RandomPolicy:
    """Any worker."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source or random.Random()

    def pick(self, candidates: Sequence[Candidate], key: str = "") -> Candidate:
        """A uniform draw."""
        return self._random.choice(candidates)


class RoundRobinPolicy:
    """One worker after the other."""

    def __init__(self) -> None:
        self._turn = -1

    def pick(self, candidates: Sequence[Candidate], key: str = "") -> Candidate:
        """The next in the order of addresses."""
        self._turn += 1
        return sorted(candidates, key=lambda candidate: candidate.key)[self._turn % len(candidates)]


class LeastLoadedPolicy:
    """The worker with the fewest requests; equal ones take turns."""

    def __init__(self) -> None:
        self._ties = RoundRobinPolicy()

    def pick(self, candidates: Sequence[Candidate], key: str = "") -> Candidate:
        """The next of the least loaded ones."""
        candidates = _holders(candidates) or candidates
        least = min(candidate.load for candidate in candidates)
        return self._ties.pick([candidate for candidate in candidates if candidate.load == least])


class AffinityPolicy:
    """The same key to the same worker, bounded by load."""

    def pick(self, candidates: Sequence[Candidate], key: str = "") -> Candidate:
        """The first in the key's rank order that is not too busy."""
        ranked = sorted(candidates, key=lambda candidate: _rank(key, candidate.key))
        if holders := _holders(ranked):
            return holders[0]
        bound = _bound(candidates)
        return next(candidate for candidate in ranked if candidate.load < bound)


def _bound(candidates: Sequence[Candidate]) -> int:
    """The load from which a worker is too busy. + 1 is the work to place: with it, somebody is always under it."""
    return math.ceil(BOUND * (sum(candidate.load for candidate in candidates) + 1) / len(candidates))


def _holders(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that hold most of the work's pictures, of the ones that hold any and are not too busy."""
    bound = _bound(candidates) + HOLDER_SLACK
    able = [candidate for candidate in candidates if candidate.held and candidate.load < bound]
    most = max((candidate.held for candidate in able), default=0)
    return [candidate for candidate in able if candidate.held == most]


def _rank(key: str, worker: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{worker}".encode(), digest_size=8).digest()


_POLICIES: dict[str, type[Policy]] = {
    "random": RandomPolicy,
    "round_robin": RoundRobinPolicy,
    "least_loaded": LeastLoadedPolicy,
    "affinity": AffinityPolicy,
}


def make_policy(name: str) -> Policy:
    """The policy of that name, as in `--encoder-router` and `--pd-router`."""
    return _POLICIES[name]()
