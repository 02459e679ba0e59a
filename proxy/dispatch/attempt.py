"""One attempt at samples of a request: the PD that makes them, and the pictures that go there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import msgspec

from epd.errors import EPDError, InternalError, NoWorker, WorkerFailed, from_info
from epd.messages import GenerateRequest, ImageSlot, TokenOutput
from epd.types import FinishReason
from proxy.cluster.worker_connection import WorkerConnection
from proxy.dispatch.encoding import Encoding
from proxy.dispatch.sample import Sample
from proxy.dispatch.work import Work

_SEED_SPAN = 1 << 63


class Listener(Protocol):
    """The request that the attempt is for. Called on the event loop; must not block."""

    def on_output(self, attempt: Attempt, sample: Sample, output: TokenOutput) -> None:
        """Something new of a sample, the end included, but no failure."""

    def on_trouble(self, attempt: Attempt, samples: list[Sample], error: EPDError) -> None:
        """The PD does not go on with these samples, which are the attempt's no more."""

    def fail(self, error: EPDError) -> bool:
        """The whole request can't be done."""


class Attempt:
    """Samples of one prompt at one PD.

    Args:
        work: of the request.
        pd: makes the tokens.
        samples: it makes; they belong to this attempt from now on.
        encoding: of the pictures, to the same PD; None: there are none.
        listener: hears of everything.
    """

    def __init__(
        self, work: Work, pd: WorkerConnection, samples: list[Sample], encoding: Encoding | None, listener: Listener
    ) -> None:
        self.work = work
        self.pd = pd
        self.samples = samples
        self.encoding = encoding
        self.failed: list[Sample] = []
        """Taken from here and not yet given to another PD."""
        self.has_tokens = False
        """Then the PD has had all embeddings."""
        self._listener = listener
        if encoding is not None:
            encoding.on_failure = self.on_encoding_failed
        for sample in samples:
            sample.attempt = self
            sample.num_attempts += 1

    def send(self, encoders: Mapping[int, WorkerConnection]) -> None:
        """Hand everything over.

        Args:
            encoders: that do pictures first, by the pictures' indices; others are picked.
        """
        for sample in list(self.samples):
            if sample.finished or sample.attempt is not self:
                continue  # the PD refused one before, and all went elsewhere
            try:
                self._send_sample(sample)
            except WorkerFailed as error:
                self._on_output(sample, error)
        if self.encoding is not None and self.samples:
            self.encoding.start(encoders)

    def _send_sample(self, sample: Sample) -> None:
        work = self.work
        prompt, turn = divmod(sample.index, work.n)
        held = self.encoding.held if self.encoding is not None else frozenset()
        slots = [
            ImageSlot(content_key=image.content_key, offset=offset, expect_cached=image.content_key in held)
            for image, offset in zip(work.images, work.image_offsets, strict=True)
        ]
        sampling = sample.sampling_left(work.sampling)
        seed = (work.sampling.seed + turn) % _SEED_SPAN
        if seed != sampling.seed:
            sampling = msgspec.structs.replace(sampling, seed=seed)
        request = GenerateRequest(
            request_id=sample.request_id,
            prompt_token_ids=work.prompts[prompt],
            images=tuple(slots),
            sampling=sampling,
            timeout_s=max(work.arrived + work.timeout_s - time.perf_counter(), 0.001),
            priority=work.priority,
            cache_salt=work.cache_salt,
            pooling=work.pooling,
            resume_token_ids=tuple(sample.token_ids),
        )
        self.pd.generate(request, partial(self._on_output, sample))

    def _on_output(self, sample: Sample, output: TokenOutput | EPDError) -> None:
        if sample.attempt is not self or sample.finished:
            return  # another PD does it now
        if isinstance(output, EPDError):
            self._take_away(sample, output)
            return
        if output.token_ids and not self.has_tokens:
            self.has_tokens = True
            if self.encoding is not None:
                self.encoding.all_arrived()
        if output.missing_keys and self.encoding is not None:
            self.encoding.bring_missing(output.missing_keys)
        self._listener.on_output(self, sample, output)
        if output.finish_reason is FinishReason.ERROR:
            error = from_info(output.error) if output.error else InternalError("The worker gave no reason.")
            if isinstance(error, NoWorker):
                self.pd.leaves()
            self._take_away(sample, error)

    def _take_away(self, sample: Sample, error: EPDError) -> None:
        self._release(sample)
        self._listener.on_trouble(self, [sample], error)

    def _release(self, sample: Sample) -> None:
        sample.attempt = None
        self.samples.remove(sample)
        if not self.samples and self.encoding is not None:
            self.encoding.is_moot = True

    def take_all(self) -> list[Sample]:
        """Take all unfinished samples away; the caller aborts them."""
        samples = [sample for sample in self.samples if not sample.finished]
        for sample in samples:
            self._release(sample)
        return samples

    def on_encoding_failed(self, error: EPDError) -> None:
        """Nobody brings a picture here."""
        if type(error) is not WorkerFailed:
            self._listener.fail(error)
            return
        # That is what encoders say when this PD does not take it: perhaps another one does.
        samples = self.take_all()
        if samples:
            self._listener.on_trouble(self, samples, error)

    async def abort(self, *samples: Sample) -> None:
        """Stop samples at the PD."""
        if samples:
            await self.pd.abort(*(sample.request_id for sample in samples))

    async def stop(self) -> None:
        """Stop all that still runs. Nothing is heard of it afterwards."""
        await self.abort(*(sample for sample in self.samples if not sample.finished))
        if self.encoding is not None:
            await self.encoding.stop()
            self.encoding.forget_listeners()
