"""Which picture is preprocessed next, and which pictures go through the vision tower together.

Policy:
- First come, first served. A batch takes prepared pictures in order of arrival until the next one exceeds the patch
  budget; it never skips one for a smaller one behind it, so no picture starves. One larger than the budget goes alone.
- Nobody waits for a picture that is still being preprocessed: it keeps its place and joins the next batch.
- One picture is worked on once, however many ask for it (single flight); a picture that nobody asks for any more
  (aborted, or out of time) is dropped at the next step of its way.
- Preprocessing stops while too many prepared bytes wait: prepared pictures are far larger than their files.

Decisions only: no threads, no event loop, no tensors. For one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, Protocol, TypeVar


class Prepared(Protocol):
    """A picture that is ready for the vision tower."""

    @property
    def num_patches(self) -> int:
        """What it takes of a batch's budget."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds while it waits."""


class JobState(Enum):
    """Where a picture is on its way, in this order."""

    WAITING = auto()
    PREPARING = auto()
    READY = auto()
    RUNNING = auto()
    DONE = auto()


S = TypeVar("S")
P = TypeVar("P", bound=Prepared)
A = TypeVar("A", bound=Hashable)


@dataclass(eq=False)
class EncodeJob(Generic[S, P, A]):
    """One picture and those who wait for it. The scheduler alone modifies it, but for `timings_ms`."""

    key: str
    source: S
    askers: dict[A, None]
    """In order of arrival."""
    state: JobState = JobState.WAITING
    prepared: P | None = None
    """Set while ready or running."""
    since: float = 0.0
    """When it entered its state."""
    waited_s: float = 0.0
    """Time spent in `WAITING` and `READY`."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Notes of the caller."""


@dataclass
class EncodeScheduler(Generic[S, P, A]):
    """Queue of pictures by content key.

    Type parameters: source of a picture (its file), prepared picture, asker (anything hashable).
    """

    max_batch_patches: int
    """Sum of `num_patches` in one batch, unless a single picture is larger."""
    max_prepared_bytes: int
    """Preprocessing pauses while prepared pictures hold so much."""
    clock: Callable[[], float] = time.monotonic
    _jobs: dict[str, EncodeJob[S, P, A]] = field(default_factory=dict)
    """In order of arrival."""
    _prepared_bytes: int = 0

    def ask(self, key: str, source: S, asker: A) -> bool:
        """Queue a picture, or join those who wait for it already.

        Returns:
            True when it was queued, and `source` is kept; False when it was on its way.
        """
        job = self._jobs.get(key)
        if job is not None:
            job.askers[asker] = None
            return False
        self._jobs[key] = EncodeJob(key, source, {asker: None}, since=self.clock())
        return True

    def leave(self, key: str, asker: A) -> None:
        """The asker does not wait any more. Unknown ones are ignored."""
        job = self._jobs.get(key)
        if job is None:
            return
        job.askers.pop(asker, None)
        if not job.askers and job.state in (JobState.WAITING, JobState.READY):
            self._remove(job)
        # Else a thread has it. Someone may still join before it is back.

    def next_to_prepare(self) -> EncodeJob[S, P, A] | None:
        """The picture to preprocess next; the caller then owes `prepared` or `finish`. None: nothing, or not now."""
        if self._prepared_bytes >= self.max_prepared_bytes:
            return None
        job = next((job for job in self._jobs.values() if job.state is JobState.WAITING), None)
        if job is not None:
            self._enter(job, JobState.PREPARING)
        return job

    def prepared(self, job: EncodeJob[S, P, A], prepared: P) -> None:
        """Preprocessing has succeeded: the picture may join a batch, or is dropped when nobody waits for it."""
        assert job.state is JobState.PREPARING
        if not job.askers:
            self._remove(job)
            return
        job.prepared = prepared
        self._prepared_bytes += prepared.nbytes
        self._enter(job, JobState.READY)

    def next_batch(self) -> list[EncodeJob[S, P, A]]:
        """Pictures to encode together; the caller then owes `finish` for each. Empty: none is ready."""
        batch: list[EncodeJob[S, P, A]] = []
        patches = 0
        for job in self._jobs.values():
            if job.state is not JobState.READY:
                continue
            assert job.prepared is not None
            patches += job.prepared.num_patches
            if batch and patches > self.max_batch_patches:
                break
            batch.append(job)
        for job in batch:
            self._release_prepared(job)
            self._enter(job, JobState.RUNNING)
        return batch

    def finish(self, job: EncodeJob[S, P, A]) -> list[A]:
        """The picture is encoded, or has failed: take it out. Returns those to tell."""
        assert job.state in (JobState.PREPARING, JobState.RUNNING)
        self._remove(job)
        return list(job.askers)

    def state(self, key: str) -> JobState:
        """Where a picture is; `DONE` when it is unknown."""
        job = self._jobs.get(key)
        return JobState.DONE if job is None else job.state

    def at_hand(self) -> tuple[int, int]:
        """Pictures that are not preprocessed, and patches of those that are and wait for a batch."""
        unprepared = sum(job.state in (JobState.WAITING, JobState.PREPARING) for job in self._jobs.values())
        ready = (job.prepared for job in self._jobs.values() if job.state is JobState.READY)
        return unprepared, sum(prepared.num_patches for prepared in ready if prepared is not None)

    @property
    def num_waiting(self) -> int:
        """Pictures that wait for preprocessing or for a batch, or are being preprocessed."""
        return len(self._jobs) - self.num_running

    @property
    def num_running(self) -> int:
        """Pictures in the vision tower."""
        return sum(job.state is JobState.RUNNING for job in self._jobs.values())

    @property
    def prepared_bytes(self) -> int:
        """What prepared pictures hold that wait for a batch."""
        return self._prepared_bytes

    def check_integrity(self) -> None:
        """Recount; raises AssertionError when the books don't balance. For tests and idle moments."""
        ready = [job for job in self._jobs.values() if job.state is JobState.READY]
        assert self._prepared_bytes == sum(job.prepared.nbytes for job in ready if job.prepared is not None)
        assert all(job.askers for job in self._jobs.values() if job.state in (JobState.WAITING, JobState.READY))

    def _enter(self, job: EncodeJob[S, P, A], state: JobState) -> None:
        now = self.clock()
        if job.state in (JobState.WAITING, JobState.READY):
            job.waited_s += now - job.since
        job.state, job.since = state, now

    def _release_prepared(self, job: EncodeJob[S, P, A]) -> None:
        if job.state is JobState.READY and job.prepared is not None:
            self._prepared_bytes -= job.prepared.nbytes

    def _remove(self, job: EncodeJob[S, P, A]) -> None:
        self._release_prepared(job)
        self._enter(job, JobState.DONE)
        job.prepared = None
        del self._jobs[job.key]
