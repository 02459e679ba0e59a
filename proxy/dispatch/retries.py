"""When work that one worker did not finish is given to another one: how often, and after which pause.

death    the worker died with the work in hand        once: it is not given to a third worker after two deaths; those
                                                     that it outlived elsewhere don't count (`Retries.note`)
lost     the connection ended, not by its fault       `MAX_LOSSES` times
leaving  the worker drains, or hands its work over    `MAX_REFUSALS` times
full     the worker's queue is full                   `MAX_REFUSALS` times, on other workers first; an answer that
                                                     has begun, until its deadline
fault    the worker reports that it failed            on `MAX_FAULTS` workers in all, other ones first
final    the work is wrong, or its time is over       never
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from epd.errors import ClientError, DeadlineExceeded, EPDError, NoWorker, Overloaded, WorkerFailed
from proxy.cluster.in_hand import WorkerGone

MAX_DEATHS = 2
MAX_DEATHS_IN_ALL = 4
"""Those that the work outlived elsewhere included."""
UNHEARD_TOKENS = 32
"""A worker may have made so many more than were heard of when it died."""
MAX_LOSSES = 3
MAX_REFUSALS = 16
MAX_FAULTS = 2
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class RetryLimits:
    """How long the proxy is patient, in seconds."""

    failover_wait_s: float = 10.0
    """For a worker to appear that takes over work which was accepted and then lost."""
    encode_timeout_s: float = 30.0
    """For one encoder to report of a picture."""
    queue_timeout_s: float | None = None
    """From arrival to the first token; None: only the deadline of the request counts."""


class PoisonSuspected(WorkerFailed):
    """Two workers died with the work in hand."""


class Trouble(StrEnum):
    """Why a worker did not finish its work."""

    DEATH = "death"
    LOST = "lost"
    LEAVING = "leaving"
    FULL = "full"
    FAULT = "fault"
    FINAL = "final"


def trouble_of(error: EPDError) -> Trouble:
    """What kind of trouble a worker's error is."""
    if isinstance(error, WorkerGone):
        return Trouble.DEATH if error.died else Trouble.LOST
    if isinstance(error, NoWorker):
        return Trouble.LEAVING
    if isinstance(error, Overloaded):
        return Trouble.FULL
    return Trouble.FINAL if isinstance(error, ClientError | DeadlineExceeded | PoisonSuspected) else Trouble.FAULT


@dataclass(frozen=True)
class Death:
    """A worker died with the work in hand."""

    address: str
    progress: int
    """Tokens made by then."""


class Retries(msgspec.Struct, eq=False):
    """What one piece of work went through so far."""

    deaths: list[Death] = []
    """Those that the work may be the cause of."""
    num_deaths: int = 0
    """Of all."""
    losses: int = 0
    refusals: int = 0
    num_full: int = 0
    faults: int = 0
    refused_by: set[str] = set()
    """Live workers that did not do it: others come first."""

    def note(self, trouble: Trouble, address: str, progress: int = 0) -> None:
        """The worker at `address` did not finish it; `progress`: tokens made so far, there and before.

        The same tokens are made everywhere. Work that another worker took well past the place where one died did not
        kill that one: it was in hand by accident.
        """
        if trouble is Trouble.DEATH:
            self.deaths = [one for one in self.deaths if progress <= one.progress + UNHEARD_TOKENS]
            self.deaths.append(Death(address, progress))
            self.num_deaths += 1
        elif trouble is Trouble.LOST:
            self.losses += 1
        elif trouble is Trouble.FAULT:
            self.faults += 1
        elif trouble is Trouble.FULL:
            self.num_full += 1
        else:
            self.refusals += 1
        if trouble in (Trouble.FULL, Trouble.FAULT):
            self.refused_by.add(address)

    @property
    def num(self) -> int:
        """How often it was tried in vain."""
        return self.num_deaths + self.losses + self.refusals + self.num_full + self.faults

    def verdict(
        self, error: EPDError, trouble: Trouble, role: str, max_faults: int = MAX_FAULTS, *, is_patient: bool = False
    ) -> EPDError | None:
        """The error that ends the work now; None: it may be tried again.

        Args:
            error: what the worker said, or what is said for it.
            trouble: what kind that is.
            role: of the worker, for people.
            max_faults: how many workers may report that they failed.
            is_patient: full workers are asked again until the deadline.
        """
        if len(self.deaths) >= MAX_DEATHS or self.num_deaths >= MAX_DEATHS_IN_ALL:
            addresses = ", ".join(one.address for one in self.deaths)
            return PoisonSuspected(
                f"The request was in hand at {self.num_deaths} {role} workers that died (at last {addresses}), so that "
                "it is not tried on another one: it may be what they died of."
            )
        is_over = (
            trouble is Trouble.FINAL
            or self.losses > MAX_LOSSES
            or self.refusals > MAX_REFUSALS
            or (self.num_full > MAX_REFUSALS and not is_patient)
            or self.faults >= max_faults
        )
        return error if is_over else None

    def pause_s(self) -> float:
        """Before the next try: exponential, with jitter, so that what was lost together does not come back together."""
        longest = min(FIRST_PAUSE_S * 2.0 ** min(self.num - 1, 16), LONGEST_PAUSE_S)
        return random.uniform(0, longest)  # full jitter
