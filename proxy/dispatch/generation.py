"""One request's life among the workers.

    pick PD and encoders → GenerateRequest × n, EncodeRequest × pictures, all at once → outputs → one terminal answer

    an encoder dies or errs   → its pictures alone go to another one (`proxy.dispatch.encoding`)
    the PD dies, is stuck, drains, is full, fails → its samples go to another PD, with their pictures, and are resumed
                                behind the tokens that are here already: the client sees one unbroken answer
    nobody else is there      → what was accepted waits for a worker to appear, `--failover-wait` at most
    tried often enough        → an error (`proxy.dispatch.retries`)
    deadline passes           → DeadlineExceeded with the stage, Abort
    client goes away          → Abort to all

The consumer reads at its own pace: outputs that it has not taken yet merge into one slot per sample, so that a slow
reader costs no queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress

from epd.errors import DeadlineExceeded, EPDError, InternalError, NoWorker, WorkerFailed
from epd.messages import TokenOutput
from epd.types import FinishReason, WorkerRole
from proxy.cluster.worker_connection import PROXY_TTFT, WorkerConnection
from proxy.cluster.worker_pool import WorkerPool
from proxy.dispatch.attempt import Attempt
from proxy.dispatch.consumer import Consumer, Teller
from proxy.dispatch.encoding import Encoding
from proxy.dispatch.retries import RetryLimits, Trouble, trouble_of
from proxy.dispatch.sample import Sample
from proxy.dispatch.timings import Timings
from proxy.dispatch.work import Update, Work
from proxy.figures.metrics import ModelFigures
from proxy.request_context import KEY_ID, REQUEST_ID
from proxy.routing.picker import Picker
from proxy.routing.placement import Plan

log = logging.getLogger(__name__)


class Generation:
    """A request in work. Made by `Dispatcher.start`, read by one consumer, closed by it whatever happens."""

    def __init__(self, work: Work, pool: WorkerPool, limits: RetryLimits, figures: ModelFigures) -> None:
        self.work = work
        self._figures = figures
        self.http_id = REQUEST_ID.get()
        """What the client knows the request by before there is an answer."""
        self.owner = KEY_ID.get()
        """Whose it is."""
        self._pool = pool
        self._limits = limits
        self._picker = Picker(work, pool)
        self._timings = Timings(work.arrived)
        self._samples = [Sample(i, f"{work.request_id}-{i}", Update(i)) for i in range(work.n * len(work.prompts))]
        self._attempts: list[Attempt] = []
        self._num_attempts = 0
        self._error: EPDError | None = None
        self._wants_logprobs = work.sampling.logprobs is not None
        self._has_news = False
        self._consumer = Consumer(self._tell_all, pool.loop)
        self._chores: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def done(self) -> bool:
        """Whether the consumer has seen the end of every sample. A request that failed never is: `next` raises."""
        if self._error is not None:
            return False
        for sample in self._samples:  # noqa: SIM110  # in a fraction of the time of `all`, at each token
            if not sample.taken:
                return False
        return True

    @property
    def num_samples(self) -> int:
        """Answers that this request gets."""
        return len(self._samples)

    @property
    def _has_tokens(self) -> bool:
        return self._timings.first_token_ms is not None

    @property
    def prompt_tokens(self) -> int:
        """Length of all prompts, pictures expanded; each counts once, whatever `n` is."""
        return sum([sample.prompt_tokens for sample in self._samples[:: self.work.n]])

    @property
    def cached_tokens(self) -> int:
        """How many of them came from the prefix cache."""
        return sum([sample.cached_tokens for sample in self._samples[:: self.work.n]])

    def token_ids(self, index: int) -> tuple[int, ...]:
        """All tokens of a sample that came so far: behind a stop string there may be more than its answer has."""
        return tuple(self._samples[index].token_ids)

    # -- for the consumer ------------------------------------------------------------------------------------------

    async def next(self, timeout_s: float | None = None, teller: Teller | None = None) -> list[Update]:
        """What is new, at least one update; an empty list when `timeout_s` passed without any.

        Args:
            timeout_s: seconds of silence; None: to the deadline.
            teller: gets what comes meanwhile, while this goes on waiting, but not what comes once or last: the prompt's
                log probabilities, the ends of samples. To wake a task for each token takes longer than telling it.
                When it returns False the list is empty, too.

        Raises:
            EPDError: the request failed; its last words were given before.
        """
        if not self._has_news and not await self._consumer.wait(self._time_left, timeout_s, teller):
            self.fail(self._too_late())
        updates = [sample.take() for sample in self._samples if sample.has_news]
        if not updates and self._error is not None:
            raise self._error
        self._has_news = self._error is not None
        return updates

    def _tell_news(self) -> None:
        self._has_news = True
        self._consumer.notify()

    def _tell_all(self, teller: Teller) -> bool:
        """Tell all that can be told. Returns whether the consumer may go on waiting."""
        can_tell, has_news = True, self._error is not None
        try:
            for sample in self._samples:
                if can_tell and sample.has_more:
                    can_tell = teller(sample.take())
                else:
                    has_news = has_news or sample.has_news
        except Exception:  # called from the worker's connection, whose other requests it must not cost
            log.exception("bug in telling %s", self.work.request_id)
            self.fail(InternalError("A bug in the proxy ended the request."))
            has_news = True
        self._has_news = has_news
        return can_tell and not has_news

    async def finish(self, index: int) -> None:
        """End a sample early: the proxy found a stop string in it."""
        sample = self._samples[index]
        was_running = not sample.finished
        sample.finished = sample.taken = True
        if was_running and sample.attempt is not None:
            await sample.attempt.abort(sample)

    async def stop(self) -> None:
        """End all samples where they are, as the model does: the consumer gets what came so far, and the end."""
        running = [sample for sample in self._samples if not sample.finished and self._error is None]
        for sample in running:
            sample.finished = True
            sample.pending.finish_reason = FinishReason.STOP
        self._tell_news()
        for sample in running:
            if sample.attempt is not None:
                await sample.attempt.abort(sample)

    async def close(self) -> None:
        """Stop what still runs. Safe to call again, and after a failure."""
        if not self._is_closed:
            self._count_tokens()
        self._consumer.stop()
        self._is_closed = True  # a PD that fails while others are told finds no heir any more
        for task in self._chores:
            task.cancel()
        unfinished = [sample for sample in self._samples if not sample.finished]
        if unfinished or self.work.images:
            for attempt in list(self._attempts):
                await attempt.abort(*unfinished)  # what it lost a moment ago may still be in hand there
                await attempt.stop()
        self._let_go()

    def _let_go(self) -> None:
        """Of all that holds this in turn: pictures are not to wait in memory until Python looks for cycles."""
        self._attempts.clear()
        self._error = None  # its traceback leads to whoever waited here
        for sample in self._samples:
            sample.attempt = None

    async def settle(self, timeout_s: float) -> None:
        """Wait a moment for what encoders report: their results may come after the tokens that they made possible."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for attempt in self._attempts:
                    if attempt.encoding is not None and attempt.samples:
                        await attempt.encoding.settled.wait()

    def timings(self) -> dict[str, float]:
        """Where the time went so far, in milliseconds."""
        return self._timings.summary()

    def _time_left(self) -> float:
        limit_s, queue_s = self.work.timeout_s, self._limits.queue_timeout_s
        if queue_s is not None and not self._has_tokens and self.work.pooling is None:
            limit_s = min(limit_s, queue_s)
        return self.work.arrived + limit_s - time.perf_counter()

    def _too_late(self) -> DeadlineExceeded:
        """Names the stage that the time ran out in."""
        spent_s = time.perf_counter() - self.work.arrived
        encodings = [attempt.encoding for attempt in self._attempts if attempt.samples and attempt.encoding]
        if any(sample.attempt is None and not sample.finished for sample in self._samples):
            stage = "while it waited for another worker to take over"
        elif self._has_tokens:
            stage = "while the answer was generated"
        elif any(not encoding.settled.is_set() for encoding in encodings):
            stage = "while pictures were encoded"
        else:
            stage = "before the first token"
        if spent_s < self.work.timeout_s:
            return DeadlineExceeded(f"The first token did not come within {spent_s:.3g} s: time ran out {stage}.")
        return DeadlineExceeded(f"The request was not finished within {self.work.timeout_s:g} s: time ran out {stage}.")

    def fail(self, error: EPDError) -> bool:
        """End with an error; the consumer hears of it. The first one is the answer; later ones are its echoes.

        Returns:
            Whether this one is the answer. It is not where all samples are at their ends, taken or not.
        """
        if self._error is not None or all(sample.finished for sample in self._samples):
            return False
        self._error = error
        self._tell_news()
        return True

    # -- towards the workers ---------------------------------------------------------------------------------------

    def send(self) -> None:
        """Pick workers and hand the request to all of them.

        Raises:
            NoWorker: a role has no live worker. Nothing was sent.
        """
        starts = []
        pds, pictures = Plan(), Plan()
        for image in self.work.images:
            self._pool.picture_sizes.note(image.num_pixels)
        for first in range(0, len(self._samples), self.work.n):
            samples = self._samples[first : first + self.work.n]
            attempt = self._attempt(self._picker.pd(first // self.work.n, plan=pds), samples)
            wanted = attempt.encoding.wanted if attempt.encoding is not None else []
            starts.append((attempt, {index: self._picker.encoder(index, plan=pictures) for index in wanted}))
        for attempt, encoders in starts:
            attempt.send(encoders)

    def _attempt(self, pd: WorkerConnection, samples: list[Sample]) -> Attempt:
        work, encoding = self.work, None
        self._num_attempts += 1
        if work.images:
            name = f"{work.request_id}-e{self._num_attempts}"
            limits, is_patient = self._limits, self._has_tokens
            encoding = Encoding(work, name, pd, self._picker, limits, self._timings, is_patient=is_patient)
            encoding.on_retry = self._on_encode_retry
        attempt = Attempt(work, pd, samples, encoding, self)
        self._attempts.append(attempt)
        return attempt

    def _on_encode_retry(self, trouble: Trouble) -> None:
        self._figures.retries[WorkerRole.ENCODER.value, trouble.value] += 1

    # -- from the workers: called on the event loop, never blocking ------------------------------------------------

    def on_output(self, attempt: Attempt, sample: Sample, output: TokenOutput) -> None:
        """Implements `Listener`."""
        if output.token_ids:
            now = time.perf_counter()
            if sample.last_token_at:
                self._figures.inter_token.observe(1000 * (now - sample.last_token_at))
            else:
                self._note_first(attempt, sample, now)
            sample.last_token_at = now
        sample.add(output)
        if output.finish_reason is not None or self._wants_logprobs:
            self._check(sample, output)
        if sample.has_news:
            self._tell_news()

    def _check(self, sample: Sample, output: TokenOutput) -> None:
        if sample.lacks_logprobs(output, self.work.sampling):
            self.fail(WorkerFailed("The prefill-decode worker left out log probabilities."))
        elif output.finish_reason not in (None, FinishReason.ERROR):
            sample.end(output)
            if (more := len(sample.token_ids) - 1) > 0:
                span_s = sample.last_token_at - sample.first_token_at
                self._figures.time_per_output_token.observe(1000 * span_s / more)
            self._timings.note(output.timings_ms)

    def _note_first(self, attempt: Attempt, sample: Sample, now: float) -> None:
        """The first tokens of a sample are here, perhaps those of the request."""
        if not self._has_tokens:
            first_ms = self._timings.note_first_token()
            attempt.pd.records.observe(PROXY_TTFT, first_ms)
            self._figures.time_to_first_token.observe(first_ms)
        sample.first_token_at = now

    def _count_tokens(self) -> None:
        figures = self._figures
        for index, sample in enumerate(self._samples):
            if index % self.work.n == 0:
                figures.prompt_tokens += sample.prompt_tokens
                figures.cached_tokens += sample.cached_tokens
            figures.completion_tokens += len(sample.token_ids)

    def on_trouble(self, attempt: Attempt, samples: list[Sample], error: EPDError) -> None:
        """Implements `Listener`."""
        if self._is_closed:
            return
        trouble = trouble_of(error)
        for sample in samples:
            sample.retries.note(trouble, attempt.pd.member.address, progress=len(sample.token_ids))
            over = sample.retries.verdict(error, trouble, "prefill-decode", is_patient=self._has_tokens)
            if over is not None or self._error is not None or self._pool.is_closing:
                self.fail(over or error)
                return
        attempt.failed += samples
        if len(attempt.failed) == len(samples):  # what else fails with these is there before the task runs
            self._spawn(self._go_on(attempt, error, trouble), "another PD")

    # -- once more, elsewhere ----------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"{name} for {self.work.request_id}")
        self._chores.add(task)
        task.add_done_callback(self._chore_done)

    def _chore_done(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("%s stopped by a bug", task.get_name(), exc_info=bug)
            self.fail(InternalError("A bug in the proxy ended the request."))

    async def _go_on(self, old: Attempt, error: EPDError, trouble: Trouble) -> None:
        """Give samples that a PD does not go on with to another one, all together."""
        samples, old.failed = old.failed, []
        if not old.has_tokens:
            samples += old.take_all()  # none has begun, and together they share the prompt and its pictures
        await old.abort(*samples)
        await asyncio.sleep(max(sample.retries.pause_s() for sample in samples))
        pd = await self._find_pd(samples, error, trouble)
        samples = [sample for sample in samples if not sample.finished]  # the consumer may have found a stop string
        if pd is None or not samples:
            return
        log.info("%s goes on at %s: %s", self.work.request_id, pd.member.address, error.message)
        self._figures.retries[pd.member.role.value, trouble.value] += 1
        self._attempt(pd, samples).send({})
        if not old.samples:
            # Only now: an encoder that is at a picture finishes it for both.
            await old.stop()
            if old in self._attempts:  # its samples may have failed at two times
                self._attempts.remove(old)

    async def _find_pd(self, samples: list[Sample], error: EPDError, trouble: Trouble) -> WorkerConnection | None:
        avoid = set().union(*(sample.retries.refused_by for sample in samples))
        # What can't begin because all are full is told so at once; what has begun is not given up for that.
        is_patient = self._has_tokens or trouble not in (Trouble.FULL, Trouble.FAULT)
        wait_s = self._limits.failover_wait_s if is_patient else 0.0
        prompt = samples[0].index // self.work.n
        try:
            return await self._picker.wait(lambda avoided: self._picker.pd(prompt, avoid=avoided), avoid, wait_s)
        except NoWorker:
            self.fail(error)
            return None
