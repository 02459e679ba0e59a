"""The prefill-decode engine: requests and embeddings in, tokens out. A library without I/O.

One thread calls it. `add_request`, `provide_embeddings` and `abort` only change queues; `step` computes and returns
what happened since the last one. Every request that `add_request` took gets exactly one `StepOutput` with a
`finish_reason`, its last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from epd.errors import (
    EPDError,
    HandedOver,
    InternalError,
    InvalidRequest,
)
from epd.tasks import check_task
from epd.types import Pooling, SamplingParams, TokenLogprobs
from workers.engine import admission, grammar
from workers.engine.chunks import ScheduledChunk
from workers.engine.deadlines import Deadlines, out_of_time
from workers.engine.embeddings import EmbeddingStore
from workers.engine.endings import Ending, ending_of, stopped
from workers.engine.grammar import GrammarCompiler, GrammarMatcher
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.model_loader import ModelInfo
from workers.engine.model_runner import Runner
from workers.engine.outputs import EngineLoad, StepOutput, terminal_output, token_output
from workers.engine.pipeline import StepPipeline
from workers.engine.placement import Placement
from workers.engine.request import Clock, EngineRequest, ImagePlaceholder, RequestStatus
from workers.engine.sampler import NOTHING, Sampled
from workers.engine.scheduler import Scheduler
from workers.engine.warm_up import warm_up
from workers.engine.work_estimate import WorkEstimate

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model."""

    def __init__(
        self,
        runner: Runner,
        info: ModelInfo,
        kv_cache: KVCacheManager,
        scheduler: Scheduler,
        store: EmbeddingStore,
        *,
        grammars: GrammarCompiler | None = None,
        clock: Clock = time.monotonic,
        pipelined: bool = False,
    ) -> None:
        """Put parts together; `workers.engine.assembly.load_engine` is the usual way.

        Args:
            runner: computes steps.
            info: what `runner`'s model takes.
            kv_cache: block tables for the cache that `runner` writes to.
            scheduler: works on `kv_cache`.
            store: for image embeddings.
            grammars: for the vocabulary of the model; None: requests with a grammar are refused.
            clock: monotonic seconds, for deadlines and stage durations.
            pipelined: launch steps before those before them are read. `runner` is a `LaunchingRunner` then.
        """
        self.info = info
        self.grammars = grammars
        """May be used from any thread: what is compiled there costs the engine's nothing."""
        self._runner = runner
        self._kv_cache = kv_cache
        self._scheduler = scheduler
        self._store = store
        self._placement = Placement(info, store, scheduler, runner)
        self._clock = clock
        self._requests: dict[str, EngineRequest] = {}
        self._deadlines = Deadlines(self._requests, clock)
        self._outputs: list[StepOutput] = []
        self._is_leaving = False
        self._estimate = WorkEstimate(
            clock, max_num_seqs=scheduler.max_num_seqs, max_num_batched_tokens=scheduler.max_num_batched_tokens
        )
        self._steps = StepPipeline(runner, scheduler, kv_cache, self._estimate, clock, ahead=pipelined)
        self.is_disturbed: Callable[[], bool] = lambda: False
        """Whether something is under way that may hold up steps for long, such as compiling."""

    # -- input -----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        images: Sequence[ImagePlaceholder] = (),
        resume_token_ids: Sequence[int] = (),
        priority: int = 0,
        cache_salt: str = "",
        pooling: Pooling | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Take a request.

        Args:
            request_id: not in use by an unfinished request.
            prompt_token_ids: with one placeholder token for each picture.
            sampling: ranges are trusted.
            images: by increasing offset. Their embeddings may be here already, or come later.
            resume_token_ids: the answer's first tokens, made by an engine that was lost. They are computed again as
                after a preemption and count as generated in every respect; outputs carry what follows them. Log
                probabilities of the prompt are not given again.
            priority: smaller goes first; see `scheduler` for how much.
            cache_salt: cached prefixes are shared only with requests that have the same one.
            pooling: end with one vector when the prompt is computed; `sampling` is not looked at.
            timeout_s: after so many seconds, a day at most, the request ends with `DeadlineExceeded`; None: never.

        Raises:
            InvalidRequest: the id is in use, the time is NaN, or prompt, pictures, pooling or what is to be resumed
                cannot be for this model.
            InvalidRequest: the grammar can't be followed.
            ContextLengthExceeded: prompt and `max_tokens` do not fit, even with pictures of one token.
            Overloaded: too many requests wait. In all these cases the request gets no output.
        """
        check_task(self.info.task, pooling)
        if request_id in self._requests:
            raise InvalidRequest(f"Request id {request_id} is in use.", param="request_id")
        admission.check_prompt(self.info, prompt_token_ids, images)
        admission.tokens_to_generate(self.info.max_model_len, len(prompt_token_ids), sampling, pooling)
        ending_token_ids = admission.ending_token_ids(self.info, sampling)
        admission.check_resumed(self.info, resume_token_ids, ending_token_ids, pooling)
        if resume_token_ids:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        request = EngineRequest(
            request_id,
            prompt_token_ids,
            sampling,
            images=images,
            resume_token_ids=resume_token_ids,
            priority=priority,
            cache_salt=cache_salt,
            pooling=pooling,
            deadline=admission.deadline_in(timeout_s, self._clock()),
            clock=self._clock,
        )
        request.ending_token_ids = ending_token_ids
        request.matcher = self._matcher(sampling)
        self._scheduler.add(request)
        self._requests[request_id] = request
        self._deadlines.add(request)
        self._placement.add(request)
        self._place(request)

    def provide_embeddings(
        self, content_key: str, token_ids: Sequence[int], grid_thw: tuple[int, int, int] | None, rows: torch.Tensor
    ) -> None:
        """Take a picture's embeddings, for all requests that wait for them and for those to come.

        Args:
            content_key: what requests call the picture.
            token_ids: what its placeholder expands to.
            grid_thw: patches (time, height, width) before merging; None where positions don't depend on them.
            rows: [image tokens among `token_ids`, hidden size], or [1 + levels, image tokens, hidden size] for a model
                with deepstack. Kept, not copied, if the dtype is the model's.

        Raises:
            InvalidRequest: the model takes no pictures.
            ContextLengthExceeded: the picture alone is longer than the context.
            WorkerFailed: the embeddings are not what this model takes. Requests go on waiting, for better ones.
            Overloaded: the store is full of embeddings in use. Requests go on waiting.
        """
        if content_key in self._store:
            self._store.expect(content_key)
            return
        embeddings = admission.checked_embeddings(self.info, token_ids, grid_thw, rows)
        for request_id in self._placement.take(content_key, embeddings):
            self._place(self._requests[request_id])

    def has_embeddings(self, content_key: str) -> bool:
        """Whether a request with this picture would find its embeddings here."""
        return content_key in self._store

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds, now. Its terminal output comes with the next step. Unknown ids are
        ignored: it may just have finished."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, RequestStatus.FINISHED_ABORTED)

    def leave(self) -> None:
        """From now on, hand over requests that a step finds no room for, instead of having them wait."""
        self._is_leaving = True

    def hand_over(self) -> None:
        """End all requests with `HandedOver`: `resume_token_ids` lets another engine go on with them."""
        for request in list(self._requests.values()):
            self._hand_over(request)

    # -- output ----------------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """Compute one step of all requests that it has room for; see `pipeline` for when it is launched.

        Returns:
            What happened since the last call, at most one output per request that is not its end and one that is.
            A request that the model fails on, also alone, ends with `InternalError`; the others of its step go on.

        Raises:
            Exception: the model fails on everything. The engine can't go on.
        """
        self._expire()
        result = self._steps.step()
        for request in result.failed:
            self._finish(request, RequestStatus.FINISHED_ERROR, error=_model_failed())
        if result.failed:
            # A device can fail for good, and this engine would then attract requests by failing fast.
            self.warm_up()
        for request, sampled in result.sampled:
            self._accept(request, sampled)
        self._finish_pooled(result.chunks)
        if self._is_leaving:
            for request in self._scheduler.not_begun():
                self._hand_over(request)
        outputs, self._outputs = self._outputs, []
        return outputs

    def has_work(self) -> bool:
        """Whether `step` would do or return something."""
        wait_s = self.seconds_to_deadline()
        is_late = wait_s is not None and wait_s <= 0
        return bool(self._outputs) or self._steps.is_busy or self._scheduler.can_step() or is_late

    def seconds_to_deadline(self) -> float | None:
        """How long an idle engine may be left alone; None: for ever. Negative when a deadline has passed."""
        return self._deadlines.seconds_to_next()

    def warm_up(self) -> None:
        """Compute something for nobody; see `workers.engine.warm_up`. Raises whatever the model raises."""
        warm_up(self._runner, self._kv_cache, self.info.task)

    @property
    def num_preemptions(self) -> int:
        """How often a request lost its blocks to an older one, since the start."""
        return self._scheduler.num_preemptions

    def load(self) -> EngineLoad:
        """How busy the engine is."""
        return EngineLoad(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            kv_used_blocks=self._kv_cache.num_used_blocks,
            kv_total_blocks=self._kv_cache.num_blocks,
            prefix_cache_queries=self._scheduler.num_queried_tokens,
            prefix_cache_hits=self._scheduler.num_cached_tokens,
            preemptions=self._scheduler.num_preemptions,
            work_ms=self._estimate.work_ms(self._requests.values()),
            ms_per_token=self._estimate.ms_per_token,
            largest_step_ms=self._estimate.largest_step_ms,
            compiled_steps=self._runner.compiled_steps,
            content_keys=self._store.keys,
        )

    def check_integrity(self) -> None:
        """Recount blocks, queues and embeddings; raises AssertionError on a leak."""
        self._scheduler.check_integrity()
        queued = {request.request_id for request in self._scheduler.requests()}
        if queued != set(self._requests):
            raise AssertionError(f"queued {queued}, known {set(self._requests)}")
        self._placement.check_integrity(queued)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _place(self, request: EngineRequest) -> None:
        """Take the request as far as its pictures are here; one that can't be placed ends."""
        try:
            is_whole = self._placement.place(request)
        except EPDError as error:
            self._finish(request, RequestStatus.FINISHED_ERROR, error=error)
            return
        except Exception:  # the model's own code, on pictures from outside: costs this request and not the engine
            log.exception("request %s can't be placed", request.request_id)
            self._finish(request, RequestStatus.FINISHED_ERROR, error=_model_failed())
            return
        if is_whole and request.resumed_token_ids:
            self._end(request, ending_of(request))

    def _matcher(self, sampling: SamplingParams) -> GrammarMatcher | None:
        if sampling.grammar is None:
            return None
        if self.grammars is None:
            raise grammar.unusable("the model's checkpoint has no tokenizer.json.")
        return self.grammars.matcher(sampling.grammar)

    def _expire(self) -> None:
        for request in self._deadlines.pop_expired():
            self._finish(request, RequestStatus.FINISHED_ERROR, error=out_of_time(request))

    def _hand_over(self, request: EngineRequest) -> None:
        error = HandedOver("The prefill-decode worker is shutting down; another one can go on.")
        self._finish(request, RequestStatus.FINISHED_ERROR, error=error)

    def _finish_pooled(self, chunks: list[ScheduledChunk]) -> None:
        for chunk in chunks:
            request = chunk.request
            if request.pooling is not None and chunk.is_last and not request.status.is_finished:
                pooled = self._runner.pooled(request.request_id)
                self._finish(request, RequestStatus.FINISHED_STOPPED, pooled=pooled)

    def _accept(self, request: EngineRequest, sampled: Sampled) -> None:
        if request.max_tokens == 0:  # all that was asked for is the prompt
            self._finish(request, RequestStatus.FINISHED_LENGTH)
            return
        if sampled.token_id == NOTHING:  # everything is masked: the answer can't go on, and there is no end to choose
            self._end(request, stopped(request))
            return
        request.append(sampled.token_id)
        if request.logits_state is not None:
            request.logits_state.advance()
        ending = ending_of(request)
        if ending is not None:
            self._end(request, ending, sampled)
        else:
            self._outputs.append(token_output(request, sampled, self._prompt_logprobs(request)))

    def _end(self, request: EngineRequest, ending: Ending | None, sampled: Sampled | None = None) -> None:
        """End a request whose answer is whole, if it is, with its last token."""
        if ending is not None:
            self._finish(
                request, ending.status, error=ending.error, sampled=sampled, stop_token_id=ending.stop_token_id
            )

    def _prompt_logprobs(self, request: EngineRequest) -> tuple[TokenLogprobs | None, ...]:
        """With the first output of a request that asks for them; () with all others."""
        if request.sampling.prompt_logprobs is None:
            return ()
        known = self._runner.prompt_logprobs(request.request_id)
        # Less than all when the request ends before its prompt was computed.
        return (None, *known) if known is not None and len(known) == request.num_prompt_tokens - 1 else ()

    def _finish(
        self,
        request: EngineRequest,
        status: RequestStatus,
        *,
        error: EPDError | None = None,
        sampled: Sampled | None = None,
        stop_token_id: int | None = None,
        pooled: tuple[float, ...] = (),
    ) -> None:
        """Free everything that a request holds and queue its terminal output: the only place where requests end."""
        prompt_logprobs = self._prompt_logprobs(request)
        if error is None and request.pooling is None and status is not RequestStatus.FINISHED_ABORTED:
            self._estimate.observe_answer(request.num_output_tokens)
        self._scheduler.finish(request, status)
        self._placement.remove(request)
        del self._requests[request.request_id]
        self._outputs.append(
            terminal_output(
                request,
                error=error,
                sampled=sampled,
                stop_token_id=stop_token_id,
                prompt_logprobs=prompt_logprobs,
                pooled=pooled,
            )
        )


def _model_failed() -> InternalError:
    return InternalError("The model failed while it worked on this request.")
