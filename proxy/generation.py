"""One request's life among the workers.

    pick PD and encoders → GenerateRequest × n, EncodeRequest × pictures, all at once → outputs → one terminal answer

    the PD took a picture before → no EncodeRequest for it; if it holds it no more it says so, and one follows
    encoder reports an error     → Abort to the PD, that error
    encoder dies or is full      → the picture goes to another encoder once (encoding is idempotent), then an error
    PD is full or drains         → before any token, all of it goes to another PD once, then an error
    PD reports an error or dies  → that error
    deadline passes              → DeadlineExceeded, Abort
    client goes away             → Abort to all

The consumer reads at its own pace: outputs that it has not taken yet merge into one slot per sample, so that a slow
reader costs no queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress

import msgspec

from epd.errors import DeadlineExceeded, EPDError, InternalError, NoWorker, WorkerFailed, from_info
from epd.messages import EncodeRequest, EncodeResult, GenerateRequest, ImageSlot, TokenOutput
from epd.types import FinishReason, WorkerRole
from proxy.placement import Plan
from proxy.sample import Sample
from proxy.timings import Timings
from proxy.work import Update, Work
from proxy.worker_connection import PROXY_TTFT, WorkerConnection
from proxy.worker_pool import WorkerPool

_SEED_SPAN = 1 << 63


class Generation:
    """A request in work. Made by `Dispatcher.start`, read by one consumer, closed by it whatever happens."""

    def __init__(self, work: Work, pool: WorkerPool) -> None:
        self.work = work
        self._timings = Timings(work.arrived)
        self._pool = pool
        self._encoders: dict[str, WorkerConnection] = {}
        self._encode_id = work.request_id
        self._encoding: set[int] = set()
        """Pictures that an encoder was asked for and has not reported of."""
        self._held: frozenset[str] = frozenset()
        """Content keys that the PD should hold, so that no encoder is asked."""
        self._all_encoded = asyncio.Event()
        self._is_sending = False
        self._left: list[tuple[WorkerConnection, tuple[str, ...]]] = []
        """Workers that this request was taken away from, and the ids that it had there."""
        self._samples = [Sample(i, f"{work.request_id}-{i}", Update(i)) for i in range(work.n * len(work.prompts))]
        self._error: EPDError | None = None
        self._news = asyncio.Event()
        self._chores: set[asyncio.Task[None]] = set()

    @property
    def done(self) -> bool:
        """Whether the consumer has seen the end of every sample. A request that failed never is: `next` raises."""
        return self._error is None and all(sample.taken for sample in self._samples)

    @property
    def num_samples(self) -> int:
        """Answers that this request gets."""
        return len(self._samples)

    @property
    def _has_tokens(self) -> bool:
        """Whether a PD has made one: then it had all embeddings."""
        return self._timings.first_token_ms is not None

    @property
    def prompt_tokens(self) -> int:
        """Length of all prompts, pictures expanded; each counts once, whatever `n` is."""
        return sum(sample.prompt_tokens for sample in self._samples[:: self.work.n])

    @property
    def cached_tokens(self) -> int:
        """How many of them came from the prefix cache."""
        return sum(sample.cached_tokens for sample in self._samples[:: self.work.n])

    # -- for the consumer ------------------------------------------------------------------------------------------

    async def next(self, timeout_s: float | None = None) -> list[Update]:
        """What is new, at least one update; an empty list when `timeout_s` passed without any.

        Raises:
            EPDError: the request failed; its last words were given before.
        """
        left = self._time_left()
        try:
            async with asyncio.timeout(left if timeout_s is None else min(left, timeout_s)):
                await self._news.wait()
        except TimeoutError:
            if timeout_s is None or left <= timeout_s:
                self._fail(DeadlineExceeded(f"The request was not finished within {self.work.timeout_s:g} s."))
        updates = [sample.take() for sample in self._samples if sample.has_news]
        if not updates and self._error is not None:
            raise self._error
        if self._error is None:
            self._news.clear()
        return updates

    async def finish(self, index: int) -> None:
        """End a sample early: the proxy found a stop string in it."""
        sample = self._samples[index]
        was_running = not sample.finished
        sample.finished = sample.taken = True
        if was_running and sample.pd is not None:
            await sample.pd.abort(sample.request_id)

    async def close(self) -> None:
        """Stop what still runs. Safe to call again, and after a failure."""
        for task in self._chores:
            task.cancel()
        for sample in self._samples:
            if sample.pd is not None and not sample.finished:
                await sample.pd.abort(sample.request_id)
        for encoder in self._encoders.values():
            await encoder.abort(self._encode_id)
        await self._abort_left()

    async def settle(self, timeout_s: float) -> None:
        """Wait a moment for what encoders report: their results may come after the tokens that they made possible."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_encoded.wait()

    def cancel(self) -> None:
        """End with an error, on somebody else's request; the consumer hears of it."""
        self._fail(WorkerFailed("The request was aborted."))

    def _time_left(self) -> float:
        return self.work.arrived + self.work.timeout_s - time.perf_counter()

    def _fail(self, error: EPDError) -> None:
        """The first error is the answer; later ones are its echoes."""
        if self._error is None and not self.done:
            self._error = error
            self._news.set()

    # -- towards the workers ---------------------------------------------------------------------------------------

    async def send(self) -> None:
        """Pick workers and hand the request to all of them.

        Raises:
            NoWorker: a role has no live worker.
            WorkerFailed: one vanished while we were sending.
        """
        work = self.work
        plan = Plan()
        for prompt, first in enumerate(range(0, len(self._samples), work.n)):
            pd = self._pick_pd(prompt, plan=plan)
            for sample in self._samples[first : first + work.n]:
                sample.pd = pd
        await self._send_all(self._samples, *self._pick_encoders(pd))

    def _pick_pd(self, prompt: int, *, plan: Plan | None = None, avoid: str | None = None) -> WorkerConnection:
        """A PD for all samples of a prompt. Raises NoWorker."""
        work = self.work
        return self._pool.pick(
            WorkerRole.PREFILL_DECODE,
            work.model,
            work.images[0].content_key if work.images else "",
            avoid=avoid,
            pictures=self._keys,
            units=len(work.prompts[prompt]),
            chain=lambda: work.prefix_chain(prompt),
            plan=plan,
        )

    def _pick_encoder(self, index: int, *, plan: Plan | None = None, avoid: str | None = None) -> WorkerConnection:
        """An encoder for a picture. Raises NoWorker."""
        key, units = self.work.images[index].content_key, self._units(index)
        return self._pool.pick(
            WorkerRole.ENCODER, self.work.model, key, avoid=avoid, pictures=(key,), units=units, plan=plan
        )

    def _units(self, index: int) -> float:
        return self._pool.picture_sizes.units(self.work.images[index].num_pixels)

    @property
    def _keys(self) -> dict[str, int]:
        """Content key → index of the first picture that has it: each content is encoded once."""
        return {image.content_key: index for index, image in reversed(list(enumerate(self.work.images)))}

    def _pick_encoders(self, pd: WorkerConnection) -> tuple[frozenset[str], dict[int, WorkerConnection]]:
        """What `pd` should hold, and an encoder for each picture that it does not. Raises NoWorker."""
        held = pd.pictures.use(self._keys)
        plan = Plan()
        for image in self.work.images:
            self._pool.picture_sizes.note(image.num_pixels)
        wanted = [index for key, index in self._keys.items() if key not in held]
        return held, {index: self._pick_encoder(index, plan=plan) for index in wanted}

    async def _send_all(
        self, samples: list[Sample], held: frozenset[str], encoders: dict[int, WorkerConnection]
    ) -> None:
        """Sending waits only while a worker's queue is full, so one after the other is as good as at once."""
        self._held = held
        self._encoding = set(encoders)
        self._note_encoded()
        self._is_sending = True
        for sample in samples:
            await self._send_sample(sample)
        for index, encoder in encoders.items():
            await self._send_picture_somewhere(encoder, index)
        self._is_sending = False

    async def _send_picture_somewhere(self, encoder: WorkerConnection, index: int) -> None:
        try:
            await self._send_picture(encoder, index)
        except WorkerFailed:
            other = self._pick_encoder(index, avoid=encoder.member.address)
            await self._send_picture(other, index, retried=True)

    async def _send_sample(self, sample: Sample) -> None:
        work, pd = self.work, sample.pd
        assert pd is not None
        prompt, turn = divmod(sample.index, work.n)
        slots = tuple(
            ImageSlot(content_key=image.content_key, offset=offset, expect_cached=image.content_key in self._held)
            for image, offset in zip(work.images, work.image_offsets, strict=True)
        )
        request = GenerateRequest(
            request_id=sample.request_id,
            prompt_token_ids=work.prompts[prompt],
            images=slots,
            sampling=msgspec.structs.replace(work.sampling, seed=(work.sampling.seed + turn) % _SEED_SPAN),
            timeout_s=max(self._time_left(), 0.001),
            priority=work.priority,
            pooling=work.pooling,
        )
        await pd.generate(request, lambda output: self._on_output(sample, pd, output))

    async def _send_picture(self, encoder: WorkerConnection, index: int, retried: bool = False) -> None:
        pd = self._samples[0].pd
        assert pd is not None
        image = self.work.images[index]
        self._encoders[encoder.member.address] = encoder
        request = EncodeRequest(
            request_id=self._encode_id,
            image_index=index,
            content_key=image.content_key,
            pd_address=pd.member.address,
            max_pixels=image.max_pixels,
            timeout_s=max(self._time_left(), 0.001),
        )
        await encoder.encode(
            request,
            image.data,
            lambda result: self._on_encoded(encoder, pd, request, result, retried=retried),
            self._units(index),
        )

    # -- from the workers: called on the event loop, never blocking ------------------------------------------------

    def _on_output(self, sample: Sample, pd: WorkerConnection, output: TokenOutput | EPDError) -> None:
        if pd is not sample.pd:
            return  # another one does it now
        if isinstance(output, EPDError):
            sample.finished = True
            self._fail(output)
            return
        if output.token_ids and not self._has_tokens:
            pd.records.observe(PROXY_TTFT, self._timings.note_first_token())
            self._note_held(pd)
        if output.missing_keys:
            self._on_missing(pd, output.missing_keys)
        sample.add(output)
        if output.finish_reason is FinishReason.ERROR:
            self._on_pd_error(sample, pd, output)
            return
        if output.finish_reason is not None:
            sample.end(output)
            self._timings.note(output.timings_ms)
        if sample.lacks_logprobs(output, self.work.sampling):
            self._fail(WorkerFailed("The prefill-decode worker left out log probabilities."))
        if sample.has_news:
            self._news.set()

    def _on_pd_error(self, sample: Sample, pd: WorkerConnection, output: TokenOutput) -> None:
        error = _error_of(output)
        if error.retryable and self._move(pd):
            return
        sample.finished = True
        self._fail(error)

    def _note_held(self, pd: WorkerConnection) -> None:
        """The PD has all pictures, whether or not their encoders have reported."""
        for key in self._keys:
            pd.pictures.remember(key)

    def _on_missing(self, pd: WorkerConnection, keys: tuple[str, ...]) -> None:
        """The PD holds pictures no more. Each sample says so; the first to say it has them encoded."""
        for key in keys:
            pd.pictures.forget(key)
        missing = {key: index for key, index in self._keys.items() if key in keys and key in self._held}
        self._held -= missing.keys()
        if missing:
            self._encoding.update(missing.values())
            self._note_encoded()
            self._spawn(self._encode_missing(pd, missing), "encode what the PD holds no more")

    def _on_encoded(
        self,
        encoder: WorkerConnection,
        pd: WorkerConnection,
        request: EncodeRequest,
        result: EncodeResult | EPDError,
        *,
        retried: bool,
    ) -> None:
        index = request.image_index
        if isinstance(result, EncodeResult) and result.error is None:
            pd.pictures.remember(request.content_key)
        if request.request_id != self._encode_id:
            return  # the embeddings were meant for a PD that does not have the request any more
        if isinstance(result, EncodeResult) and result.error is None:
            self._timings.note_encoded(result)
            self._encoding.discard(index)
            self._note_encoded()
            return
        error, is_dead = (result, True) if isinstance(result, EPDError) else (_error_of(result), False)
        if (is_dead or error.retryable) and not retried and self._error is None and not self._has_tokens:
            self._spawn(self._encode_elsewhere(encoder, index, error), "encode again")
        else:
            error.param = error.param or (None if is_dead else self.work.images[index].param)
            self._fail_encode(index, error)

    def _fail_encode(self, index: int, error: EPDError) -> None:
        """No encoder did it. Harmless once the PD has made a token, for then it had all embeddings."""
        if not self._has_tokens:
            self._fail(error)
        self._encoding.discard(index)
        self._note_encoded()

    # -- once more, elsewhere ----------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _encode_missing(self, pd: WorkerConnection, pictures: dict[str, int]) -> None:
        try:
            for index in pictures.values():
                if pd is self._samples[0].pd:  # else another one has the request, and all pictures were sent there
                    await self._send_picture_somewhere(self._pick_encoder(index), index)
        except (NoWorker, WorkerFailed) as error:
            self._fail(error)

    async def _encode_elsewhere(self, encoder: WorkerConnection, index: int, error: EPDError) -> None:
        """Give the picture of an encoder that can't do it to another one."""
        try:
            other = self._pick_encoder(index, avoid=encoder.member.address)
            await self._send_picture(other, index, retried=True)
        except NoWorker:
            self._fail_encode(index, error)
        except WorkerFailed as second:
            self._fail_encode(index, second)

    def _move(self, full: WorkerConnection) -> bool:
        """Begin to give what a PD has of this request to another one. False: too late, done before, or nobody else."""
        if self._left or self._is_sending or self._has_tokens or self._error is not None:
            return False
        samples = [sample for sample in self._samples if sample.pd is full and not sample.finished]
        try:
            other = self._pick_pd(samples[0].index // self.work.n, avoid=full.member.address)
            held, encoders = self._pick_encoders(other)
        except NoWorker:
            return False
        self._left.append((full, tuple(sample.request_id for sample in samples)))
        self._left.extend((encoder, (self._encode_id,)) for encoder in self._encoders.values())
        self._encode_id = f"{self.work.request_id}-again"
        self._encoders.clear()
        for sample in samples:
            sample.pd = other
        self._spawn(self._send_again(samples, held, encoders), "another PD")
        return True

    async def _send_again(
        self, samples: list[Sample], held: frozenset[str], encoders: dict[int, WorkerConnection]
    ) -> None:
        try:
            await self._abort_left()
            await self._send_all(samples, held, encoders)
        except (NoWorker, WorkerFailed) as error:
            self._fail(error)

    async def _abort_left(self) -> None:
        for worker, request_ids in self._left:
            await worker.abort(*request_ids)

    # -- figures -----------------------------------------------------------------------------------------------------

    def _note_encoded(self) -> None:
        if self._encoding:
            self._all_encoded.clear()
        else:
            self._all_encoded.set()

    def timings(self) -> dict[str, float]:
        """Where the time went so far, in milliseconds."""
        return self._timings.summary()


def _error_of(answer: TokenOutput | EncodeResult) -> EPDError:
    return from_info(answer.error) if answer.error else InternalError("The worker gave no reason.")
