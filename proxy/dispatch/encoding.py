"""Brings the pictures of a request to one PD, each by whichever encoder does it first.

held by the PD  → nothing, unless the PD says that it holds the picture no more
encoder dies, is silent for too long, is full, fails → that picture alone goes to another encoder (`retries`)
the picture is bad                                   → its error is that of the request
the PD has made a token → it had all pictures: whatever encoders report now is of no consequence
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from epd.errors import ClientError, DeadlineExceeded, EPDError, InternalError, NoWorker, WorkerFailed, from_info
from epd.messages import EncodeRequest, EncodeResult
from epd.types import WorkerRole
from proxy.cluster.worker_connection import WorkerConnection
from proxy.cluster.worker_pool import no_worker
from proxy.dispatch.retries import Retries, RetryLimits, Trouble, trouble_of
from proxy.dispatch.timings import Timings
from proxy.dispatch.work import Work
from proxy.routing.picker import Picker

log = logging.getLogger(__name__)

MAX_FAULTS = 3
"""Encoders that may fail a picture: their faults include a PD that does not take it, which another one may mend."""


class Encoding:
    """The pictures of one request on their way to one PD.

    Args:
        work: of the request.
        name: what the ids of encode requests begin with.
        pd: where the embeddings go.
        picker: of encoders.
        limits: on patience.
        timings: are told of each result.
        is_patient: wait where all encoders are full, instead of saying so at once.

    Set `on_failure` before `start`: it is called with the error of a picture that nobody could do.
    """

    def __init__(
        self,
        work: Work,
        name: str,
        pd: WorkerConnection,
        picker: Picker,
        limits: RetryLimits,
        timings: Timings,
        *,
        is_patient: bool,
    ) -> None:
        self._work = work
        self._name = name
        self._pd = pd
        self._picker = picker
        self._limits = limits
        self._timings = timings
        self._is_patient = is_patient
        self.on_failure: Callable[[EPDError], None]
        self.on_retry: Callable[[Trouble], None]
        """Called when a picture goes to another encoder, with the reason."""
        self.forget_listeners()
        self.held = pd.pictures.use(picker.keys)
        """Content keys that the PD should hold, so that no encoder is asked."""
        self.is_moot = False
        """The PD had all pictures, or has the request no more."""
        self.settled = asyncio.Event()
        """Nothing is under way."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._asked: dict[int, tuple[WorkerConnection, str]] = {}
        """Picture → the encoder that has it now, and the id that it has there."""

    @property
    def wanted(self) -> list[int]:
        """Pictures that the PD does not hold."""
        return [index for key, index in self._picker.keys.items() if key not in self.held]

    def start(self, encoders: Mapping[int, WorkerConnection]) -> None:
        """Have the pictures that the PD does not hold encoded, the first time by these encoders where given."""
        for index in self.wanted:
            self._bring(index, encoders.get(index))
        self._note_settled()

    def bring_missing(self, keys: tuple[str, ...]) -> None:
        """The PD holds pictures no more. Each sample says so; the first to say it has them encoded."""
        for key in keys:
            self._pd.pictures.forget(key)
        missing = {key: index for key, index in self._picker.keys.items() if key in keys and key in self.held}
        self.held -= missing.keys()
        for index in missing.values():
            self._bring(index, None)
        self._note_settled()

    def all_arrived(self) -> None:
        """The PD has all pictures, whether or not their encoders have reported."""
        self.is_moot = True
        for key in self._picker.keys:
            self._pd.pictures.remember(key)

    def forget_listeners(self) -> None:
        """Nobody wants to hear any more: they hold this, and it must not hold them and the pictures with them."""
        self.on_failure, self.on_retry = _ignore, _ignore

    async def stop(self) -> None:
        """Nobody needs the pictures any more."""
        self.is_moot = True
        for task in self._tasks.values():
            task.cancel()
        for encoder, request_id in list(self._asked.values()):
            await encoder.abort(request_id)

    # -- one picture -------------------------------------------------------------------------------------------------

    def _bring(self, index: int, encoder: WorkerConnection | None) -> None:
        task = asyncio.create_task(self._encode(index, encoder), name=f"encode {self._name} {index}")
        self._tasks[index] = task
        task.add_done_callback(lambda _: self._ended(index, task))

    def _ended(self, index: int, task: asyncio.Task[None]) -> None:
        if self._tasks.get(index) is task:
            del self._tasks[index]
            self._note_settled()
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, EPDError):
            log.error("%s stopped by a bug", task.get_name(), exc_info=error)
            error = InternalError("A bug in the proxy ended the request.")
        if error is not None and not self.is_moot:
            self.on_failure(error)

    def _note_settled(self) -> None:
        if self._tasks:
            self.settled.clear()
        else:
            self.settled.set()

    async def _encode(self, index: int, encoder: WorkerConnection | None) -> None:
        """Try until an encoder has done it. Raises why none did."""
        retries = Retries()
        error: EPDError = no_worker(WorkerRole.ENCODER, self._work.model)
        wait_s, trouble = self._limits.failover_wait_s, Trouble.LOST
        while True:
            if encoder is None:
                encoder = await self._find(index, retries, wait_s, error)
                if retries.num:
                    self.on_retry(trouble)
            failed = await self._encode_at(encoder, index, retries)
            if failed is None or self.is_moot:
                return
            error, trouble = failed, self._trouble(failed)
            retries.note(trouble, encoder.member.address)
            over = retries.verdict(error, trouble, "encoder", MAX_FAULTS, is_patient=self._is_patient)
            if over is not None:
                if isinstance(over, ClientError):
                    over.param = over.param or self._work.images[index].param
                raise over
            # Where all encoders are full or fail, the answer says so at once; one that was lost may be replaced. A PD
            # that does not take the embeddings may be about to be found dead.
            is_told = trouble in (Trouble.FULL, Trouble.FAULT) and not isinstance(error, WorkerFailed)
            wait_s = 0.0 if is_told and not self._is_patient else self._limits.failover_wait_s
            encoder = None
            await asyncio.sleep(retries.pause_s())

    def _trouble(self, error: EPDError) -> Trouble:
        if isinstance(error, DeadlineExceeded) and self._time_left() > 0:
            return Trouble.FAULT  # that was the limit of one encoder
        return trouble_of(error)

    async def _find(self, index: int, retries: Retries, wait_s: float, error: EPDError) -> WorkerConnection:
        try:
            return await self._picker.wait(
                lambda avoid: self._picker.encoder(index, avoid=avoid), retries.refused_by, wait_s
            )
        except NoWorker as nobody:
            raise (nobody if isinstance(error, NoWorker) else error) from nobody

    async def _encode_at(self, encoder: WorkerConnection, index: int, retries: Retries) -> EPDError | None:
        """Have one encoder do it. Returns why it did not."""
        image, pd = self._work.images[index], self._pd
        answered: asyncio.Future[EncodeResult | EPDError] = asyncio.get_running_loop().create_future()
        request_id = f"{self._name}-{index}-{retries.num + 1}"
        limit_s = max(min(self._time_left(), self._limits.encode_timeout_s), 0.001)
        request = EncodeRequest(
            request_id=request_id,
            image_index=index,
            content_key=image.content_key,
            pd_address=pd.member.address,
            max_pixels=image.max_pixels,
            timeout_s=limit_s,
        )

        def on_result(result: EncodeResult | EPDError) -> None:
            if isinstance(result, EncodeResult) and result.error is None:
                pd.pictures.remember(image.content_key)
            if not answered.done():
                answered.set_result(result)

        self._asked[index] = (encoder, request_id)
        try:
            async with asyncio.timeout(limit_s):
                await encoder.encode(request, image.data, on_result, self._picker.units(index))
                result = await answered
        except WorkerFailed as error:
            return error
        except TimeoutError:
            await encoder.abort(request_id)
            if self._time_left() > 0:  # else the client left it too little time, which says nothing of the encoder
                encoder.circuit.failed()
            return DeadlineExceeded(f"The encoder {encoder.member.address} did not report within {limit_s:.3g} s.")
        if isinstance(result, EPDError):
            return result
        if result.error is not None:
            return from_info(result.error)
        self._timings.note_encoded(result)
        return None

    def _time_left(self) -> float:
        return self._work.arrived + self._work.timeout_s - time.perf_counter()


def _ignore(_: object) -> None:
    pass
