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
    DeadlineExceeded,
    EPDError,
    HandedOver,
    InternalError,
    InvalidRequest,
)
from epd.limits import check_prompt_logprobs
from epd.tasks import check_task
from epd.types import Pooling, PoolingKind, SamplingParams, TokenLogprobs, WorkerTask
from workers.engine import admission, grammar, logits_state, model_loader
from workers.engine.compiled_forward import CompiledForward
from workers.engine.config import EngineConfig
from workers.engine.deadlines import Deadlines
from workers.engine.embeddings import EmbeddingStore, expand_prompt
from workers.engine.grammar import GrammarCompiler, GrammarMatcher
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.logits_state import LogitsState
from workers.engine.model_loader import ModelInfo
from workers.engine.model_runner import Runner
from workers.engine.outputs import EngineLoad, StepOutput
from workers.engine.request import Clock, EngineRequest, ImagePlaceholder, RequestStatus
from workers.engine.sampler import NOTHING, Sampled, SamplingRow
from workers.engine.scheduler import ScheduledChunk, Scheduler
from workers.engine.tensor_parallel import ParallelGroup
from workers.load_model import PrefillDecodeModel

log = logging.getLogger(__name__)

_WARM_UP_ID = "(warm-up)"
_WORK_INTERVAL_S = 0.1
_DOING = {
    RequestStatus.WAITING_FOR_EMBEDDINGS: "it waited for image embeddings",
    RequestStatus.WAITING: "it waited in the queue of the prefill-decode worker",
    RequestStatus.PREEMPTED: "it waited, preempted, in the queue of the prefill-decode worker",
    RequestStatus.RUNNING: "its tokens were computed",
}
_WARM_UP_POOLING = {
    WorkerTask.GENERATE: None,
    WorkerTask.SCORE: Pooling(PoolingKind.SCORE),
    WorkerTask.EMBED: Pooling(PoolingKind.MEAN),
}


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
    ) -> None:
        """Put parts together; `from_checkpoint` is the usual way.

        Args:
            runner: computes steps.
            info: what `runner`'s model takes.
            kv_cache: block tables for the cache that `runner` writes to.
            scheduler: works on `kv_cache`.
            store: for image embeddings.
            grammars: for the vocabulary of the model; None: requests with a grammar are refused.
            clock: monotonic seconds, for deadlines and stage durations.
        """
        self.info = info
        self.grammars = grammars
        """May be used from any thread: what is compiled there costs the engine's nothing."""
        self._runner = runner
        self._kv_cache = kv_cache
        self._scheduler = scheduler
        self._store = store
        self._clock = clock
        self._requests: dict[str, EngineRequest] = {}
        self._missing: dict[str, set[str]] = {}
        """Request id → content keys that it still waits for."""
        self._deadlines = Deadlines(self._requests, clock)
        self._outputs: list[StepOutput] = []
        self._is_leaving = False
        self._durations = PrefillDecodeModel()
        self._work_ms = 0.0
        self._work_due = 0.0
        """When the work at hand is added up again."""
        self.is_disturbed: Callable[[], bool] = lambda: False
        """Whether something is under way that may hold up steps for long, such as compiling."""

    @classmethod
    def from_checkpoint(
        cls, config: EngineConfig, *, group: ParallelGroup | None = None, clock: Clock = time.monotonic
    ) -> Engine:
        """Load a model and allocate its KV cache.

        Args:
            config: of model and limits.
            group: the ranks that share the model, of which this is the first; None: it is this process's alone.
            clock: as for the constructor.

        Raises:
            ConfigError: checkpoint or settings cannot work.
        """
        loaded = model_loader.load(config, group)
        kv_cache = KVCacheManager(loaded.num_blocks, loaded.block_size, prefix_caching=config.enable_prefix_caching)
        scheduler = Scheduler(
            kv_cache,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=loaded.max_num_batched_tokens,
            max_waiting=config.max_waiting,
            target_step_s=loaded.target_step_s,
        )
        store = EmbeddingStore(config.embedding_store_bytes, config.embedding_unclaimed_ttl_s, clock)
        tokens = loaded.num_blocks * loaded.block_size
        log.info(
            "KV cache: %d tokens in blocks of %d; %.1f requests of the full context of %d tokens fit at once",
            tokens, loaded.block_size, tokens / loaded.info.max_model_len, loaded.info.max_model_len,
        )  # fmt: skip
        engine = cls(
            loaded.runner, loaded.info, kv_cache, scheduler, store, grammars=loaded.runner.grammars, clock=clock
        )
        if isinstance(loaded.forward, CompiledForward):
            ended = loaded.forward.ended
            engine.is_disturbed = lambda: not ended.is_set()
        return engine

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
            pooling=pooling,
            deadline=admission.deadline_in(timeout_s, self._clock()),
            clock=self._clock,
        )
        request.ending_token_ids = ending_token_ids
        request.matcher = self._matcher(sampling)
        self._scheduler.add(request)
        self._requests[request_id] = request
        self._deadlines.add(request)
        keys = {image.content_key for image in images}
        self._missing[request_id] = {key for key in keys if key not in self._store}
        for key in keys - self._missing[request_id]:
            self._store.claim(key, request_id)
        self._place_prompt(request)

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
            WorkerFailed: the embeddings are not what this model takes. Requests go on waiting, for better ones.
            Overloaded: the store is full of embeddings in use. Requests go on waiting.
        """
        if content_key in self._store:
            self._store.expect(content_key)
            return
        self._store.put(content_key, admission.checked_embeddings(self.info, token_ids, grid_thw, rows))
        for request_id, missing in list(self._missing.items()):
            if content_key in missing:
                missing.remove(content_key)
                self._store.claim(content_key, request_id)
                self._place_prompt(self._requests[request_id])

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
        """Compute one step of all requests that it has room for.

        Returns:
            What happened since the last call, at most one output per request that is not its end and one that is.
            A request that the model fails on, also alone, ends with `InternalError`; the others of its step go on.

        Raises:
            Exception: the model fails on everything. The engine can't go on.
        """
        self._expire()
        chunks = self._scheduler.schedule()
        if chunks:
            for request, sampled in self._compute(chunks):
                self._accept(request, sampled)
            self._finish_pooled(chunks)
        if self._is_leaving:
            for request in self._scheduler.not_begun():
                self._hand_over(request)
        outputs, self._outputs = self._outputs, []
        return outputs

    def has_work(self) -> bool:
        """Whether `step` would do or return something."""
        wait_s = self.seconds_to_deadline()
        return bool(self._outputs) or self._scheduler.can_step() or (wait_s is not None and wait_s <= 0)

    def seconds_to_deadline(self) -> float | None:
        """How long an idle engine may be left alone; None: for ever. Negative when a deadline has passed."""
        return self._deadlines.seconds_to_next()

    def warm_up(self) -> None:
        """Compute a prompt, and a token if the model gives any, for nobody.

        Pays for lazy set-up at start, and proves that the model works.

        Raises:
            Exception: whatever the model raises.
        """
        pooling = _WARM_UP_POOLING[self.info.task]
        request = EngineRequest(_WARM_UP_ID, [0, 0], SamplingParams(top_p=0.9), pooling=pooling, clock=self._clock)
        if not self._kv_cache.grow(_WARM_UP_ID, 3):
            return  # all blocks hold requests, so it is warm
        try:
            self._runner.add(_WARM_UP_ID, request.token_ids, [])
            table = tuple(self._kv_cache.block_table(_WARM_UP_ID))
            for start, length in ((0, 2), (2, 1)) if pooling is None else ((0, 2),):
                chunk = ScheduledChunk(request, start, length, table)
                rows = [_sampling_row(request)] if chunk.samples else []
                request.token_ids += [sampled.token_id for sampled in self._runner.run([chunk], rows)]
        finally:
            self._runner.remove(_WARM_UP_ID)
            self._kv_cache.free(_WARM_UP_ID)

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
            work_ms=self._add_up_work(),
            ms_per_token=self._durations.ms_per_token,
            largest_step_ms=self._largest_step_ms(),
        )

    def check_integrity(self) -> None:
        """Recount blocks, queues and embeddings; raises AssertionError on a leak."""
        self._scheduler.check_integrity()
        self._store.check_integrity()
        queued = {request.request_id for request in self._scheduler.requests()}
        if queued != set(self._requests) or queued != set(self._missing):
            raise AssertionError(f"queued {queued}, known {set(self._requests)}, missing of {set(self._missing)}")
        if not self._store.users() <= queued:
            raise AssertionError(f"embeddings are held for {self._store.users() - queued}, which are gone")

    # -- inside ----------------------------------------------------------------------------------------------------

    def _place_prompt(self, request: EngineRequest) -> None:
        """Expand the prompt as far as embeddings are here, and let the request compete for steps with that."""
        missing = self._missing[request.request_id]
        if missing and not self._scheduler.computes_early(request):
            return
        embeddings = {image.content_key: self._store.claim(image.content_key, request.request_id)
                      for image in request.images if image.content_key not in missing}  # fmt: skip
        try:
            spans = expand_prompt(request, embeddings)
            placed = [(span.offset, embeddings[span.content_key]) for span in spans]
            request.atomic_spans = self.info.adapter.atomic_spans(placed)
            self._scheduler.check_atomic_spans(request)
            request.max_tokens = admission.tokens_to_generate(
                self.info.max_model_len, request.num_prompt_tokens, request.sampling, request.pooling
            )
            check_prompt_logprobs(request.sampling, request.num_prompt_tokens)
            if not missing:
                self._add_logits_state(request)
            num_known = request.num_known_tokens if missing else request.num_prompt_tokens
            self._runner.add(request.request_id, request.token_ids[:num_known], placed)
        except EPDError as error:
            self._finish(request, RequestStatus.FINISHED_ERROR, error=error)
            return
        except Exception:  # the model's own code, on pictures from outside: costs this request and not the engine
            log.exception("request %s can't be placed", request.request_id)
            self._finish(request, RequestStatus.FINISHED_ERROR, error=_model_failed())
            return
        if missing:
            self._scheduler.embeddings_arrived(request)
            return
        if request.status is RequestStatus.WAITING_FOR_EMBEDDINGS:
            self._scheduler.embeddings_complete(request)
        if request.resumed_token_ids:
            self._end_if_whole(request)

    def _matcher(self, sampling: SamplingParams) -> GrammarMatcher | None:
        if sampling.grammar is None:
            return None
        if self.grammars is None:
            raise grammar.unusable("the model's checkpoint has no tokenizer.json.")
        return self.grammars.matcher(sampling.grammar)

    def _add_logits_state(self, request: EngineRequest) -> None:
        if request.pooling is None and logits_state.is_needed(request.sampling):
            request.logits_state = LogitsState(
                request.sampling,
                request.token_ids,
                request.num_prompt_tokens,
                ending=request.ending_token_ids,
                vocab_size=self.info.vocab_size,
                matcher=request.matcher,
            )

    def _expire(self) -> None:
        for request in self._deadlines.pop_expired():
            error = DeadlineExceeded(f"The request's time ran out while {_DOING[request.status]}.")
            self._finish(request, RequestStatus.FINISHED_ERROR, error=error)

    def _hand_over(self, request: EngineRequest) -> None:
        error = HandedOver("The prefill-decode worker is shutting down; another one can go on.")
        self._finish(request, RequestStatus.FINISHED_ERROR, error=error)

    def _compute(self, chunks: list[ScheduledChunk]) -> list[tuple[EngineRequest, Sampled]]:
        """Run the step. Returns new tokens by request, without those that the model fails on, which end."""
        try:
            return self._run(chunks)
        except Exception:  # the step's edge: whatever the model throws, memory included
            log.exception("a step of %d requests failed; trying them one by one", len(chunks))
        pairs: list[tuple[EngineRequest, Sampled]] = []
        is_well = True
        for chunk in chunks:
            try:
                pairs += self._run([chunk])
            except Exception as error:  # costs this request and not its neighbours
                is_well = False
                log.error("request %s fails also alone: %r", chunk.request.request_id, error)
                self._kv_cache.distrust(chunk.request.request_id)
                self._finish(chunk.request, RequestStatus.FINISHED_ERROR, error=_model_failed())
        if not is_well:
            # A device can fail for good, and this engine would then attract requests by failing fast.
            self.warm_up()
        return pairs

    def _run(self, chunks: list[ScheduledChunk]) -> list[tuple[EngineRequest, Sampled]]:
        sampled = [chunk.request for chunk in chunks if chunk.samples]
        started_at = self._clock()
        tokens = self._runner.run(chunks, [_sampling_row(request) for request in sampled])
        self._note_duration(chunks, self._clock() - started_at)
        pairs = list(zip(sampled, tokens, strict=True))
        for chunk in chunks:
            self._scheduler.advance(chunk)
        return pairs

    def _note_duration(self, chunks: Sequence[ScheduledChunk], duration_s: float) -> None:
        self._scheduler.note_duration(chunks, duration_s)
        decode_tokens = sum(chunk.request.is_decoding for chunk in chunks)
        prefill_tokens = sum(chunk.length for chunk in chunks) - decode_tokens
        self._durations.observe_step(prefill_tokens, decode_tokens, duration_s * 1000)

    def _add_up_work(self) -> float:
        """What the requests at hand will still take, in milliseconds."""
        if not self._requests:
            self._work_due = 0.0
            return 0.0
        now = self._clock()
        if now < self._work_due:
            return self._work_ms
        self._work_due = now + _WORK_INTERVAL_S
        prefill = decode = 0.0
        for request in self._requests.values():
            prefill += 0 if request.is_decoding else request.num_uncomputed_tokens
            decode += self._durations.remaining_tokens(request.num_output_tokens, request.max_tokens)
        batch = min(len(self._requests), self._scheduler.max_num_seqs)
        self._work_ms = self._durations.work_ms(prefill, decode, batch)
        return self._work_ms

    def _largest_step_ms(self) -> float:
        ms_per_token, scheduler = self._durations.ms_per_token, self._scheduler
        if not ms_per_token:
            return 0.0
        return scheduler.max_num_batched_tokens * ms_per_token + self._durations.step_ms(scheduler.max_num_seqs)

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
            self._stop(request)
            return
        request.append(sampled.token_id)
        if request.logits_state is not None:
            request.logits_state.advance()
        if self._end_if_whole(request, sampled):
            return
        is_first = request.num_output_tokens == len(request.resumed_token_ids) + 1
        self._outputs.append(
            StepOutput(
                request.request_id,
                (sampled.token_id,),
                prompt_tokens=request.num_prompt_tokens if is_first else 0,
                cached_tokens=(request.num_cached_tokens or 0) if is_first else 0,
                logprobs=_logprobs(sampled),
                prompt_logprobs=self._prompt_logprobs(request),
            )
        )

    def _end_if_whole(self, request: EngineRequest, sampled: Sampled | None = None) -> bool:
        """End a request whose answer is complete with its last token, which is `sampled` or was resumed."""
        token, state = request.token_ids[-1], request.logits_state
        if token in request.ending_token_ids:
            self._stop(request, sampled, stop_token_id=token)
        elif state is not None and state.is_complete:  # without asking the model for an end
            self._stop(request, sampled)
        elif request.num_output_tokens >= request.max_tokens:
            self._finish(request, RequestStatus.FINISHED_LENGTH, sampled=sampled)
        return request.status.is_finished

    def _stop(
        self,
        request: EngineRequest,
        sampled: Sampled | None = None,
        stop_token_id: int | None = None,
    ) -> None:
        """End an answer that is whole, or whose grammar failed: that looks the same to the sampler."""
        state = request.logits_state
        reason = None if state is None or state.matcher is None else state.matcher.error
        if reason is None:
            self._finish(request, RequestStatus.FINISHED_STOPPED, sampled=sampled, stop_token_id=stop_token_id)
        else:
            self._finish(request, RequestStatus.FINISHED_ERROR, error=grammar.unusable(reason))

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
            self._durations.observe_answer(request.num_output_tokens)
        self._scheduler.finish(request, status)
        self._runner.remove(request.request_id)
        for image in request.images:
            self._store.release(image.content_key, request.request_id)
        del self._missing[request.request_id]
        del self._requests[request.request_id]
        self._outputs.append(
            StepOutput(
                request.request_id,
                () if sampled is None else (sampled.token_id,),
                finish_reason=request.finish_reason,
                stop_token_id=stop_token_id,
                error=None if error is None else error.to_info(),
                prompt_tokens=request.num_prompt_tokens,
                cached_tokens=request.num_cached_tokens or 0,
                logprobs=_logprobs(sampled),
                prompt_logprobs=prompt_logprobs,
                pooled=pooled,
                timings_ms=request.timings_ms(),
            )
        )


def _model_failed() -> InternalError:
    return InternalError("The model failed while it worked on this request.")


def _logprobs(sampled: Sampled | None) -> tuple[TokenLogprobs, ...]:
    return () if sampled is None or sampled.logprobs is None else (sampled.logprobs,)


def _sampling_row(request: EngineRequest) -> SamplingRow:
    return SamplingRow(request.sampling, request.num_tokens, request.logits_state)
