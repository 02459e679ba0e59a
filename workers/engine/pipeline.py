"""Steps one after the other, or, on a device that computes by itself, each launched before the one before it is read:

    host     launch 1 │ launch 2 │ read 1, endings, outputs │ launch 3 │ read 2, endings, outputs │ …
    device            └─ 1 ──────┴─ 2 ────────────────────────────────┴─ 3 ───────────────────────── …

Between two steps the device then waits for nobody. Step n + 1 takes the tokens that step n samples where they are, on
the device. The host learns one step late that a token ended its answer: what was computed behind it is dropped, and its
blocks are nobody else's before that is done.

`Scheduler.schedule_ahead` says which steps can be launched early. For the others, such as those with prompts, all that
is under way is read first. At most one step is under way between two calls.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from workers.engine.chunks import ScheduledChunk, in_batch_order
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.model_runner import LaunchedStep, LaunchingRunner, Runner
from workers.engine.request import Clock, EngineRequest
from workers.engine.sampler import Sampled, SamplingRow
from workers.engine.scheduler import Scheduler
from workers.engine.work_estimate import WorkEstimate

log = logging.getLogger(__name__)

_PAUSE_STEPS = 32
"""So many steps are not launched ahead after one that was launched in vain: the launch failed, or the sampler had to
look twice at the step before it, as it most likely has to again."""


@dataclass
class StepResult:
    """What one step did, without requests that ended while it was computed."""

    chunks: list[ScheduledChunk] = field(default_factory=list)
    """That were computed. Their requests have been advanced."""
    sampled: list[tuple[EngineRequest, Sampled]] = field(default_factory=list)
    failed: list[EngineRequest] = field(default_factory=list)
    """Those that the model fails on, also alone."""


class _Flight(NamedTuple):
    """A step that was launched."""

    chunks: list[ScheduledChunk]
    sampling: list[EngineRequest]
    step: LaunchedStep
    launched_at: float


class _Computed:
    """Implements `LaunchedStep` for runners that compute at once."""

    was_revised = False

    def __init__(self, sampled: list[Sampled]) -> None:
        self._sampled = sampled

    def read(self) -> list[Sampled]:
        return self._sampled


class StepPipeline:
    """Has steps decided and computed.

    Args:
        runner: computes them. A `LaunchingRunner` if `ahead`.
        scheduler: decides them.
        kv_cache: that of both.
        estimate: learns how long they took.
        clock: monotonic seconds.
        ahead: launch steps before those before them are read, where that can be.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        kv_cache: KVCacheManager,
        estimate: WorkEstimate,
        clock: Clock,
        *,
        ahead: bool = False,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._kv_cache = kv_cache
        self._estimate = estimate
        self._clock = clock
        self._ahead = ahead
        self._flight: _Flight | None = None
        self._pause_steps = 0
        """So many steps are not launched ahead."""
        self._read_at = clock()
        self.num_ahead = 0
        """Steps that were launched ahead, since the start."""

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way."""
        return self._flight is not None

    def step(self) -> StepResult:
        """Finish the step that is under way, or else compute one from start to end; perhaps launch the next one.

        Nothing was computed if there is nothing to compute, or if all requests of the step have ended meanwhile.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            chunks = self._scheduler.schedule()
            if not chunks:
                return StepResult()
            try:
                flight = self._launch(chunks)
            except Exception:  # the step's edge: whatever the model throws, memory included
                return self._one_by_one(chunks)
        following = self._launch_ahead(flight)
        try:
            sampled = flight.step.read()
        except Exception:  # as above; the device may tell of it only now
            self._drop(following)
            return self._one_by_one(flight.chunks)
        if following is not None and flight.step.was_revised:
            self._drop(following)
            following = None
            self._pause_steps = _PAUSE_STEPS
        self._flight = following
        self._kv_cache.hold([] if following is None else [chunk.request.request_id for chunk in following.chunks])
        return self._landed(flight, sampled)

    def _launch(self, chunks: Sequence[ScheduledChunk], before: _Flight | None = None) -> _Flight:
        chunks = in_batch_order(chunks)
        sampling = [chunk for chunk in chunks if chunk.samples]
        rows = [SamplingRow(chunk.request.sampling, chunk.end, chunk.request.logits_state) for chunk in sampling]
        launched_at = self._clock()
        step: LaunchedStep
        if self._ahead:
            runner = cast("LaunchingRunner", self._runner)
            step = runner.launch(chunks, rows, None if before is None else before.step)
        else:
            step = _Computed(self._runner.run(chunks, rows))
        return _Flight(chunks, [chunk.request for chunk in sampling], step, launched_at)

    def _launch_ahead(self, flight: _Flight) -> _Flight | None:
        """Launch the step behind one that is under way, if that can be."""
        if not self._ahead:
            return None
        if self._pause_steps > 0:
            self._pause_steps -= 1
            return None
        chunks = self._scheduler.schedule_ahead(flight.chunks)
        if not chunks:
            return None
        try:
            following = self._launch(chunks, flight)
        except Exception:  # costs nothing but time: the same step is tried again, and answered for, when it is due
            log.exception("a step of %d requests can't be launched ahead", len(chunks))
            self._pause_steps = _PAUSE_STEPS
            return None
        self.num_ahead += 1
        return following

    def _landed(self, flight: _Flight, sampled: Sequence[Sampled]) -> StepResult:
        """Account for a step that was read."""
        now = self._clock()
        # A step that was launched ahead began when the one before it ended.
        duration_s = now - max(flight.launched_at, self._read_at)
        self._read_at = now
        decode_tokens = sum(chunk.is_decode for chunk in flight.chunks)
        prefill_tokens = sum(chunk.length for chunk in flight.chunks) - decode_tokens
        self._scheduler.note_duration(prefill_tokens, decode_tokens, duration_s)
        self._estimate.observe_step(prefill_tokens, decode_tokens, duration_s)
        chunks = flight.chunks
        pairs = list(zip(flight.sampling, sampled, strict=True))
        if self._ahead:  # else nothing else has happened since it was launched
            chunks = _unfinished(chunks)
            pairs = [pair for pair in pairs if not pair[0].status.is_finished]
        for chunk in chunks:
            self._scheduler.advance(chunk)
        return StepResult(chunks, pairs)

    def _one_by_one(self, chunks: Sequence[ScheduledChunk]) -> StepResult:
        """Compute the chunks of a step that failed, each alone. Called where the failure is caught."""
        chunks = _unfinished(chunks)
        log.exception("a step of %d requests failed; trying them one by one", len(chunks))
        result = StepResult()
        for chunk in chunks:
            try:
                flight = self._launch([chunk])
                landed = self._landed(flight, flight.step.read())
            except Exception as error:  # costs this request and not its neighbours
                log.error("request %s fails also alone: %r", chunk.request.request_id, error)
                self._kv_cache.distrust(chunk.request.request_id)
                result.failed.append(chunk.request)
            else:
                result.chunks += landed.chunks
                result.sampled += landed.sampled
        self._kv_cache.hold([])
        return result

    def _drop(self, flight: _Flight | None) -> None:
        """Wait for a step that was computed for nothing: its requests' blocks may then be given to others."""
        if flight is not None:
            with contextlib.suppress(Exception):  # if it fails, it fails again when it is computed again
                flight.step.read()


def _unfinished(chunks: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
    return [chunk for chunk in chunks if not chunk.request.status.is_finished]
