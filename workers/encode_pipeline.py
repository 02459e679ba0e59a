"""Image files to embeddings: decoding and preprocessing in a thread pool, the vision tower in one thread.

    ask ─▶ waiting ─▶ preprocessing (pool) ─▶ ready ─▶ a batch in the tower (one thread, one batch at a time) ─▶ answer

What goes when is up to `workers.encode_scheduler`; here are the threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from PIL import Image

from epd.errors import EPDError, InternalError
from epd.observability import Stage, StageRecorder, Stopwatch
from workers.embedding_cache import EmbeddingCache, EncodedImage
from workers.encode_scheduler import EncodeJob, EncodeScheduler, JobState, Prepared
from workers.images import ImageLimits, decode_image
from workers.load_model import EncodeModel
from workers.stall_watch import Progress

log = logging.getLogger(__name__)

MAX_PREPARED_BYTES = 512 << 20
"""Preprocessed pictures that wait for the tower. One picture of 64k patches takes 300 MB."""

P = TypeVar("P", bound=Prepared)


class Vision(Protocol[P]):
    """What is used of `workers.vision.VisionModel`."""

    def preprocess(self, image: Image.Image, max_pixels: int | None = None) -> P:
        """What `encode_for_wire` takes; any number of threads at once."""
        ...

    def encode_for_wire(self, images: list[P]) -> list[EncodedImage]:
        """Run the tower, on one thread."""
        ...

    def warm_up(self) -> None:
        """Encode a blank picture."""


@dataclass(frozen=True)
class ImageFile:
    """An image file, and how large its picture may be when it is resized."""

    data: memoryview
    max_pixels: int | None


@dataclass(frozen=True)
class Encoded:
    """A picture's embeddings, and what they took."""

    image: EncodedImage
    timings_ms: dict[str, float]


@dataclass
class StageNote:
    """Where a picture is, for those who have run out of time."""

    name: Stage = Stage.ENCODE_QUEUE


_STAGES = {JobState.PREPARING: Stage.PREPROCESS, JobState.RUNNING: Stage.ENCODE}
"""The others are waiting."""

_Asker = asyncio.Future[Encoded]


class EncodePipeline(Generic[P]):
    """Decodes and preprocesses in a thread pool, runs the tower in one thread, a batch at a time.

    Args:
        vision: the model.
        limits: bounds of what is decoded.
        cache: keeps what was encoded, even when nobody waits for it any more.
        max_batch_patches: budget of a batch.
        preprocess_threads: size of the pool.
        stages: where durations are noted.
        broken: called when the tower fails even on a blank picture: the process should be restarted.
        nice: how far the threads that compute stand back.
    """

    def __init__(
        self,
        vision: Vision[P],
        *,
        limits: ImageLimits,
        cache: EmbeddingCache[EncodedImage],
        max_batch_patches: int,
        preprocess_threads: int,
        stages: StageRecorder,
        broken: Callable[[], None],
        nice: int = 0,
    ) -> None:
        self._vision = vision
        self._limits = limits
        self._cache = cache
        self._stages = stages
        self._broken = broken
        self.scheduler: EncodeScheduler[ImageFile, P, _Asker] = EncodeScheduler(max_batch_patches, MAX_PREPARED_BYTES)
        self._max_preparing = preprocess_threads
        self._preparing = 0
        self._encoding = False
        self._preprocess_pool = ThreadPoolExecutor(preprocess_threads, "preprocess", _stand_back, (nice,))
        self._tower_thread = ThreadPoolExecutor(1, "tower", _stand_back, (nice,))
        self._tasks: set[asyncio.Task[None]] = set()
        self._durations = EncodeModel()
        self._steps = 0
        """Pictures that were preprocessed, and batches."""
        self._running_patches = 0
        self.batches = 0
        self.images = 0
        self.joined = 0

    async def warm_up(self) -> None:
        """Run the tower once, in its thread."""
        await asyncio.get_running_loop().run_in_executor(self._tower_thread, self._vision.warm_up)

    async def encode(self, content_key: str, file: ImageFile, stage: StageNote | None = None) -> Encoded:
        """Embeddings of one picture; those who ask for the same at once share the work. May be cancelled.

        Args:
            content_key: of the picture.
            file: the picture.
            stage: where to note how far it came.

        Raises:
            EPDError: the picture can't be decoded or encoded.
        """
        asker: _Asker = asyncio.get_running_loop().create_future()
        if not self.scheduler.ask(content_key, file, asker):
            self.joined += 1
        self._pump()
        try:
            return await asker
        finally:
            if stage is not None:
                stage.name = _STAGES.get(self.scheduler.state(content_key), Stage.ENCODE_QUEUE)
            self.scheduler.leave(content_key, asker)
            self._pump()

    def picture_ms(self) -> float:
        """What one more picture takes, as learned; 0: nothing is known yet."""
        return self._durations.picture_ms(self._max_preparing)

    def work_ms(self) -> float:
        """What the pictures at hand will still take."""
        num_unprepared, patches = self.scheduler.at_hand()
        in_tower = self._durations.patches_ms(patches + self._running_patches)
        return num_unprepared * self.picture_ms() + in_tower

    def progress(self) -> Progress:
        """Whether threads move, of preprocessing or of the tower."""
        largest_ms = self._durations.patches_ms(max(self._running_patches, self.scheduler.max_batch_patches))
        return Progress(self._preparing > 0 or self._encoding, self._steps, largest_ms / 1000)

    async def stop(self) -> None:
        """Wait for what threads are doing, then end them. Nobody may wait for a picture any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._preprocess_pool.shutdown()
        self._tower_thread.shutdown()

    def _pump(self) -> None:
        """Start whatever can start now. Called after every change."""
        while self._preparing < self._max_preparing and (job := self.scheduler.next_to_prepare()):
            self._preparing += 1
            self._start(self._prepare(job))
        if not self._encoding and (batch := self.scheduler.next_batch()):
            self._encoding = True
            self._start(self._encode(batch))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepare(self, job: EncodeJob[ImageFile, P, _Asker]) -> None:
        loop = asyncio.get_running_loop()
        try:
            with Stopwatch() as clock:
                prepared = await loop.run_in_executor(self._preprocess_pool, self._decode_and_preprocess, job.source)
        except Exception as error:  # the edge of a thread that handles hostile files
            self._finish(job, error)
        else:
            job.timings_ms[Stage.PREPROCESS] = clock.ms
            self._durations.observe_preprocessing(clock.ms)
            self.scheduler.prepared(job, prepared)
        finally:
            self._preparing -= 1
            self._steps += 1
            self._pump()

    def _decode_and_preprocess(self, file: ImageFile) -> P:
        return self._vision.preprocess(decode_image(file.data, self._limits), file.max_pixels)

    async def _encode(self, batch: list[EncodeJob[ImageFile, P, _Asker]]) -> None:
        loop = asyncio.get_running_loop()
        images = [job.prepared for job in batch if job.prepared is not None]
        self._running_patches = sum(image.num_patches for image in images)
        with Stopwatch() as clock:
            outcomes = await loop.run_in_executor(self._tower_thread, self._run_tower, images)
        self.batches += 1
        self._steps += 1
        self._durations.observe_batch(len(images), self._running_patches, clock.ms)
        self._running_patches = 0
        for job, outcome in zip(batch, outcomes, strict=True):
            job.timings_ms[Stage.ENCODE] = clock.ms
            self._finish(job, outcome)
        self._encoding = False
        if any(isinstance(outcome, Exception) for outcome in outcomes) and not await self._is_well():
            self._broken()
        self._pump()

    def _run_tower(self, images: list[P]) -> list[EncodedImage | Exception]:
        """An outcome for each picture: one that makes the batch fail must not take the others with it."""
        try:
            return list(self._vision.encode_for_wire(images))
        except Exception as error:  # the edge of the tower's thread
            if len(images) == 1:
                return [error]
            log.warning("a batch of %d pictures failed (%s), trying them one by one", len(images), error)
        return [self._run_tower([image])[0] for image in images]

    async def _is_well(self) -> bool:
        """A device can fail for good, and this encoder would then attract requests by failing fast."""
        try:
            await self.warm_up()
        except Exception:  # whatever it is, the tower can't encode
            log.exception("the vision tower fails even on a blank picture")
            return False
        return True

    def _finish(self, job: EncodeJob[ImageFile, P, _Asker], outcome: EncodedImage | Exception) -> None:
        askers = [asker for asker in self.scheduler.finish(job) if not asker.done()]
        if isinstance(outcome, Exception):
            error = for_client(outcome)
            for asker in askers:
                asker.set_exception(error)
            return
        self._cache.put(job.key, outcome)
        self.images += 1
        job.timings_ms[Stage.ENCODE_QUEUE] = job.waited_s * 1000
        for stage, duration_ms in job.timings_ms.items():
            self._stages.observe(stage, duration_ms)
        for asker in askers:
            asker.set_result(Encoded(outcome, job.timings_ms))


def for_client(error: BaseException) -> EPDError:
    """The error itself when it is meant for clients; else a nameless one, and the trace goes to the log."""
    if isinstance(error, EPDError):
        return error
    log.error("encoding failed", exc_info=error)
    return InternalError("The encoder failed on this image.")


def _stand_back(nice: int) -> None:
    """Lower the priority of this thread and of those that it starts, as OpenMP's are; the event loop keeps its own.

    An event loop that stood back as well would be silent under load, and taken for dead.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)
