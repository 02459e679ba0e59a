"""The encoder: original image bytes in, embeddings straight to the PD.

    EncodeRequest ─▶ Encoder ─▶ cache? ──────────────────────────────────────────┐ hit
                                  │ miss                                          ▼
                                  └▶ EncodePipeline: decode, preprocess ─▶ tower ─▶ EmbeddingTransfer ─▶ EncodeResult
                                     (threads)                   (one thread)

Two tasks for each request: one does the work and may be cancelled at any point, the other waits for it, whatever
becomes of it, and sends the one `EncodeResult`.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from epd import collector
from epd.checkpoint import fingerprint
from epd.config import EncoderConfig
from epd.errors import (
    DeadlineExceeded,
    EPDError,
    ErrorInfo,
    HandedOver,
    NoWorker,
    Overloaded,
    ProtocolError,
)
from epd.messages import Abort, AnyMessage, EncodeRequest, EncodeResult, Load, Peers, StageStats
from epd.observability import Stage, StageRecorder, Stopwatch
from epd.types import WorkerRole
from workers.core_turns import CoreTurns
from workers.embedding_cache import EmbeddingCache, EncodedImage
from workers.embedding_transfer import EmbeddingTransfer
from workers.encode_pipeline import EncodePipeline, ImageFile, P, StageNote, Vision, for_client
from workers.images import ImageLimits
from workers.runtime import WorkerRuntime
from workers.service import Send
from workers.stall_watch import Progress

log = logging.getLogger(__name__)

MAX_HELD_BYTES = 1 << 30
"""Image files in memory at once; more are refused as overloaded."""
_BATCH_PATCHES = {"cpu": 1024, "cuda": 16384}
"""By device. More are no faster on a CPU, and the first picture of a batch waits for the last."""
_LONGEST_TIMEOUT_S = 24 * 3600.0
_ABORTED = ErrorInfo(code="aborted", message="The request was aborted.")


class Transfer(Protocol):
    """What is used of `workers.embedding_transfer.EmbeddingTransfer`."""

    def set_roster(self, proxy: bytes, addresses: tuple[str, ...]) -> None:
        """Note where this proxy may have pictures sent."""

    def forget_roster(self, proxy: bytes) -> None:
        """The proxy has gone."""

    def knows(self, address: str) -> bool:
        """Whether any proxy has named this address."""
        ...

    async def ship(self, address: str, content_key: str, image: EncodedImage) -> None:
        """Return when the PD has the picture. Raises ServerError when it has not."""

    async def close(self) -> None:
        """Part from all PDs."""


@dataclass(eq=False)
class _Accepted:
    """A request in work."""

    peer: bytes
    request: EncodeRequest
    nbytes: int
    work: asyncio.Task[EncodeResult]
    cancelled_because: ErrorInfo = _ABORTED


class Encoder(Generic[P]):
    """The encoder's `workers.service.Service`.

    Args:
        vision: the model.
        transfer: the way to the PDs.
        send: answers a proxy.
        config: bounds.
        device: where the tower runs, "cpu" or "cuda".
        broken: called when the tower can't encode any more.
    """

    def __init__(
        self,
        vision: Vision[P],
        transfer: Transfer,
        send: Send,
        config: EncoderConfig,
        *,
        device: str = "cpu",
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._transfer = transfer
        self._send = send
        self._max_requests = config.max_queued_images
        self._stages = StageRecorder()
        self._cache: EmbeddingCache[EncodedImage] = EmbeddingCache(config.embedding_cache_bytes)
        self.pipeline = EncodePipeline(
            vision,
            limits=ImageLimits(max_pixels=config.max_image_pixels),
            cache=self._cache,
            max_batch_patches=config.max_batch_patches or _BATCH_PATCHES[device],
            preprocess_threads=config.preprocess_threads,
            stages=self._stages,
            broken=broken,
            nice=config.nice,
        )
        self._accepted: set[_Accepted] = set()
        self._held_bytes = 0
        self._answers: set[asyncio.Task[None]] = set()
        self._draining = False
        self._failed = 0

    # -- workers.service.Service -----------------------------------------------------------------------------------

    def handle(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        """Take a request, an abort or a roster."""
        match message:
            case EncodeRequest():
                self._take(peer, message, buffers[0])
            case Abort():
                self._cancel(lambda one: one.peer == peer and one.request.request_id in message.request_ids)
            case Peers():
                self._transfer.set_roster(peer, message.pd_addresses)
            case _:
                raise ProtocolError(f"an encoder takes no {type(message).__name__}")

    def peer_gone(self, peer: bytes) -> None:
        """Stop everything that was done for this proxy."""
        self._transfer.forget_roster(peer)
        self._cancel(lambda one: one.peer == peer)

    async def drain(self) -> None:
        """Refuse new pictures; return when those in work are answered."""
        self._draining = True
        while self._answers:
            await asyncio.wait(self._answers)

    async def hand_over(self) -> None:
        """Give the pictures in work back, for another encoder."""
        self._cancel(lambda _: True, HandedOver("The encoder is shutting down; another one can go on.").to_info())
        await self.drain()

    async def stop(self) -> None:
        """Give back what is left, end threads and connections."""
        await self.hand_over()
        await self.pipeline.stop()
        await self._transfer.close()

    def load(self) -> Load:
        """Pictures in the tower, and all others in work."""
        running = self.pipeline.scheduler.num_running
        return Load(
            running=running,
            waiting=max(0, len(self._accepted) - running),
            work_ms=self.pipeline.work_ms(),
            ms_per_unit=self.pipeline.picture_ms(),
        )

    def progress(self) -> Progress:
        """Of preprocessing and the tower."""
        return self.pipeline.progress()

    def stages(self) -> dict[str, StageStats]:
        """Durations since start: `encode_queue`, `preprocess`, `encode`, `transfer`, and `e2e` of them all."""
        return self._stages.snapshot()

    def counters(self) -> dict[str, int]:
        """Counts since start."""
        return {
            "embedding_cache_hits": self._cache.hits,
            "embedding_cache_misses": self._cache.misses,
            "embedding_cache_evictions": self._cache.evictions,
            "images_encoded": self.pipeline.images,
            "images_joined": self.pipeline.joined,
            "images_failed": self._failed,
            "encode_batches": self.pipeline.batches,
        }

    # -- one request -----------------------------------------------------------------------------------------------

    def _take(self, peer: bytes, request: EncodeRequest, data: memoryview) -> None:
        refusal = self._refusal(request, data)
        if refusal is not None:
            self._keep(self._send_result(peer, _failure(request, refusal.to_info())))
            return
        work = asyncio.create_task(self._encode_and_ship(request, data), name=f"encode {request.request_id}")
        accepted = _Accepted(peer, request, data.nbytes, work)
        self._accepted.add(accepted)
        self._held_bytes += data.nbytes
        self._keep(self._answer(accepted))

    def _refusal(self, request: EncodeRequest, data: memoryview) -> EPDError | None:
        """Why a request is not accepted; None when it is."""
        if self._draining:
            return NoWorker("The encoder is shutting down.")
        if len(self._accepted) >= self._max_requests:
            return Overloaded(f"The encoder has {self._max_requests} images in work, which is its limit.")
        if self._held_bytes + data.nbytes > MAX_HELD_BYTES:
            return Overloaded(f"The encoder holds {self._held_bytes} bytes of images, its limit is {MAX_HELD_BYTES}.")
        if not request.timeout_s > 0:  # NaN too
            return DeadlineExceeded("There was no time left to encode the image.")
        if not self._transfer.knows(request.pd_address):
            return NoWorker(f"The encoder knows no prefill-decode worker at {request.pd_address}.")
        return None

    def _keep(self, answer: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(answer)
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _encode_and_ship(self, request: EncodeRequest, data: memoryview) -> EncodeResult:
        clock = Stopwatch()
        stage = StageNote()
        try:
            async with asyncio.timeout(min(request.timeout_s, _LONGEST_TIMEOUT_S)):
                result = await self._within_deadline(request, data, stage)
        except TimeoutError as error:
            taken = f"The image was not encoded within {request.timeout_s:.3g} s"
            raise DeadlineExceeded(f"{taken}; the time ran out in stage {stage.name}.") from error
        self._stages.observe(Stage.E2E, clock.elapsed_ms())
        return result

    async def _within_deadline(self, request: EncodeRequest, data: memoryview, stage: StageNote) -> EncodeResult:
        image = self._cache.get(request.content_key)
        cache_hit = image is not None
        timings_ms: dict[str, float] = {}
        if image is None:
            encoded = await self.pipeline.encode(request.content_key, ImageFile(data, request.max_pixels), stage)
            image, timings_ms = encoded.image, dict(encoded.timings_ms)
        stage.name = Stage.TRANSFER
        with Stopwatch() as clock:
            await self._transfer.ship(request.pd_address, request.content_key, image)
        timings_ms[Stage.TRANSFER] = clock.ms
        self._stages.observe(Stage.TRANSFER, clock.ms)
        return EncodeResult(
            request_id=request.request_id,
            image_index=request.image_index,
            num_tokens=len(image.token_ids),
            cache_hit=cache_hit,
            timings_ms=timings_ms,
        )

    async def _answer(self, accepted: _Accepted) -> None:
        # `wait` does not raise what the work raises, and sees cancelled work too, even if it had not begun.
        await asyncio.wait({accepted.work})
        self._accepted.discard(accepted)
        self._held_bytes -= accepted.nbytes
        await self._send_result(accepted.peer, _result_of(accepted))

    async def _send_result(self, peer: bytes, result: EncodeResult) -> None:
        self._failed += result.error is not None
        await self._send(peer, result)

    def _cancel(self, chosen: Callable[[_Accepted], bool], because: ErrorInfo = _ABORTED) -> None:
        for accepted in self._accepted:
            if chosen(accepted) and accepted.work.cancel():
                accepted.cancelled_because = because


def _result_of(accepted: _Accepted) -> EncodeResult:
    work = accepted.work
    if work.cancelled():
        return _failure(accepted.request, accepted.cancelled_because)
    error = work.exception()
    if error is not None:
        return _failure(accepted.request, for_client(error).to_info())
    return work.result()


def _failure(request: EncodeRequest, error: ErrorInfo) -> EncodeResult:
    return EncodeResult(request_id=request.request_id, image_index=request.image_index, error=error)


async def run_encoder(config: EncoderConfig) -> int:
    """Load the vision tower, and nothing else, and serve until SIGTERM or SIGINT.

    Returns:
        The exit code of the process.

    Raises:
        ConfigError: a flag, the checkpoint or the address is of no use.
    """
    from workers.vision import VisionModel, pick_device  # noqa: PLC0415 - torch; the rest of this module does without

    collector.keep()
    # Pillow warns of damaged metadata; strangers' files must not write into our log.
    warnings.filterwarnings("ignore", module="PIL")
    model = fingerprint(config.model)
    device = pick_device(config.device)
    vision = VisionModel.load(config.model, dtype=config.dtype, device=device, load_format=config.load_format)
    if config.share_cores is not None and device == "cpu":
        vision.take_turns(CoreTurns(config.share_cores))
    runtime = WorkerRuntime(
        config,
        role=WorkerRole.ENCODER,
        model=model,
        dtype=vision.dtype,
        max_num_seqs=config.max_queued_images,
        max_requests=config.max_queued_images,
    )
    transfer = EmbeddingTransfer(sender=f"encoder {config.worker_addr}", model=model)
    encoder = Encoder(vision, transfer, runtime.send, config, device=device, broken=lambda: runtime.shut_down(1))
    await encoder.pipeline.warm_up()
    collector.settle()
    return await runtime.run(encoder)
