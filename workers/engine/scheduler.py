"""Who computes how many tokens in the next step. Decides on integers; knows no tensor.

Policy:
1. A step computes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests.
2. Requests that decode come first, one token each; then prompts under way; then waiting requests. Each of these in the
   order of their ranks: by arrival, but each level of priority counts as `PRIORITY_STEP_S` of waiting. So a smaller
   priority goes first, and no stream of others keeps a request from its turn for longer than that.
3. A prompt that exceeds what is left of the step is computed in chunks, over several steps. While answers run, prompts
   get no more of a step than keeps it near its target duration, which is longer while more prompts wait than answers
   run (`prefill_pace`).
4. A chunk never ends inside an atomic span. The first prompt of a step may exceed what the decodes have left of the
   step, by as much as its atomic span needs, so that it can't be put off for ever.
5. A request is admitted when blocks for its whole prompt are free, beside one for each that runs, and takes them all.
   It takes over what is cached of its beginning, and only the rest is computed. If another request computes the next
   block of it in this very step, it waits for that one, and those behind it may go first.
6. What is left of step and memory then computes, early, what stands before the first missing picture of requests that
   wait for embeddings: whole blocks of it, which stay behind in the prefix cache. The request itself keeps nothing, is
   admitted as in 5 when its pictures are here, and gives up blocks of a prompt under way to everybody above.
7. A decoding request without a free block preempts the last in rank: it loses its blocks, waits, and is computed again.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator, Sequence

from epd.errors import InvalidRequest, Overloaded
from workers.engine.chunks import ScheduledChunk
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.prefill_pace import PrefillPace
from workers.engine.request import EngineRequest, RequestStatus

log = logging.getLogger(__name__)

PRIORITY_STEP_S = 30.0
"""A request of priority p has the rank of one of priority 0 that comes p times so much later."""


def _rank(request: EngineRequest) -> tuple[float, int]:
    """Sorts requests; never changes, so that queues stay sorted and no two requests can preempt each other in turn."""
    return request.arrived_at + request.priority * PRIORITY_STEP_S, request.arrival_order


def _is_last_token(request: EngineRequest) -> bool:
    """Whether the token that is being computed is the last one that the request may have."""
    return request.num_output_tokens + 1 >= request.max_tokens


def _can_go_ahead(request: EngineRequest) -> bool:
    """Whether the host has nothing to do between two tokens: no masks, penalties or log probabilities to make."""
    asks = request.sampling.logprobs is not None or request.sampling.prompt_logprobs is not None
    return request.logits_state is None and not asks


class Scheduler:
    """Keeps the queues and the block tables consistent with each other."""

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int,
        target_step_s: float = 0,
    ) -> None:
        """Make an idle scheduler; see `EngineConfig` for the limits. A step has room for one token of each sequence."""
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        self._kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._max_waiting = max_waiting
        self._pace = PrefillPace(target_step_s)
        self._waiting_for_embeddings: dict[str, EngineRequest] = {}
        self._waiting: list[EngineRequest] = []
        self._running: list[EngineRequest] = []
        self._early: list[EngineRequest] = []
        """Those that wait for embeddings and have something to compute meanwhile."""
        self._arrivals = 0
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        """Prompt tokens of requests that looked into the prefix cache, once each."""
        self.num_cached_tokens = 0
        """Those of them that were found there."""

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in a queue: for embeddings, for their first step or, preempted, for their next one."""
        return len(self._waiting) + len(self._waiting_for_embeddings)

    def requests(self) -> Iterator[EngineRequest]:
        """All unfinished requests."""
        yield from self._running
        yield from self._waiting
        yield from self._waiting_for_embeddings.values()

    def not_begun(self) -> list[EngineRequest]:
        """Requests that could be computed and never were, for want of room."""
        return [request for request in self._waiting if request.status is RequestStatus.WAITING]

    def can_step(self) -> bool:
        """Whether `schedule` would find something to compute."""
        return bool(self._running or self._waiting or self._early)

    def add(self, request: EngineRequest) -> None:
        """Queue a new request, by its status for embeddings or for computation.

        Raises:
            Overloaded: the queue is full.
        """
        if self.num_waiting >= self._max_waiting:
            raise Overloaded(f"{self.num_waiting} requests are waiting already")
        self._arrivals += 1
        request.arrival_order = self._arrivals
        if request.status is RequestStatus.WAITING_FOR_EMBEDDINGS:
            self._waiting_for_embeddings[request.request_id] = request
        else:
            self._enqueue(request)

    def check_atomic_spans(self, request: EngineRequest) -> None:
        """Refuse a prompt that no sequence of steps could compute.

        Raises:
            InvalidRequest: an atomic span has more tokens than a step.
        """
        longest = max((end - start for start, end in request.atomic_spans), default=0)
        if longest > self.max_num_batched_tokens:
            raise InvalidRequest(
                f"A picture takes {longest} tokens, which must be computed in one step, but a step has at most "
                f"{self.max_num_batched_tokens}. Send a smaller picture, or have --max-num-batched-tokens raised.",
                param="messages",
            )

    def computes_early(self, request: EngineRequest) -> bool:
        """Whether it is of use to know a prompt in part: what is computed early can only be found in the cache."""
        return self._kv_cache.prefix_caching and request.reads_prefix_cache

    def embeddings_arrived(self, request: EngineRequest) -> None:
        """Note that more is known of the prompt of a request that goes on waiting for embeddings."""
        self._end_early(request)  # its blocks reach as far as the prompt was known before
        if self._early_end(request) > request.early_end:
            bisect.insort(self._early, request, key=_rank)

    def embeddings_complete(self, request: EngineRequest) -> None:
        """Move a request that waited for embeddings to the queue for computation, at the place of its rank."""
        del self._waiting_for_embeddings[request.request_id]
        self._end_early(request)
        request.status = RequestStatus.WAITING
        self._enqueue(request)

    def schedule(self) -> list[ScheduledChunk]:
        """Decide the next step. The caller computes it, then calls `advance` for each chunk.

        Preempts and admits as the policy says. At most one chunk per request; may be empty.
        """
        preemptions = self.num_preemptions
        chunks = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(chunks)
        prompts = len(self._waiting) + len(self._running) - len(chunks)
        limit = self._pace.limit(prompts, len(chunks)) if chunks else None
        budget = budget if limit is None else min(budget, limit)
        budget = self._schedule_prefills(chunks, budget)
        if self.num_preemptions == preemptions:  # else a newcomer would take the blocks just freed
            in_flight = {name for chunk in chunks if not chunk.is_decode for name in self._names(chunk)}
            budget = self._admit(chunks, budget, in_flight)
            self._compute_early(chunks, budget, in_flight)
        return chunks

    def schedule_ahead(self, chunks: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
        """Decide the step behind one that is being computed, before its tokens are known.

        It is of answers alone, one token each. Those that a token ends are in it for nothing; those that end by their
        length are not. Preempts and admits nobody: where that may be called for, and where a request needs its last
        token on the host to choose the next one, there is no such step.

        Args:
            chunks: of the step that is being computed; not advanced yet.

        Returns:
            At most one chunk per request; empty: call `schedule` when the tokens are known.
        """
        sampling = {chunk.request.request_id: chunk for chunk in chunks if chunk.samples}
        last = [sampling.get(request.request_id) for request in self._running]
        going_on = [chunk for chunk in last if chunk is not None and not _is_last_token(chunk.request)]
        if None in last or not all(_can_go_ahead(chunk.request) for chunk in going_on):
            return []
        if self._early or (self._waiting and (len(going_on) < len(last) or self._could_admit())):
            return []
        if not all(self._kv_cache.grow(chunk.request.request_id, chunk.end + 1) for chunk in going_on):
            return []
        return [self._decode(chunk.request, chunk.end) for chunk in going_on]

    def note_duration(self, prefill_tokens: int, decode_tokens: int, duration_s: float) -> None:
        """Learn how long a step of so many tokens took."""
        self._pace.observe(prefill_tokens, decode_tokens, duration_s)

    def advance(self, chunk: ScheduledChunk) -> None:
        """Record that a chunk's keys and values are in the cache now."""
        request = chunk.request
        request.num_computed_tokens = chunk.end
        self._kv_cache.record(request, chunk.start)
        if request.status is RequestStatus.WAITING_FOR_EMBEDDINGS:
            request.num_early_tokens += chunk.length
            if chunk.end >= self._early_end(request):
                request.early_end = chunk.end
                self._end_early(request)

    def finish(self, request: EngineRequest, status: RequestStatus) -> None:
        """Take an unfinished request out, wherever it is, and free its blocks at once."""
        if request.status is RequestStatus.WAITING_FOR_EMBEDDINGS:
            del self._waiting_for_embeddings[request.request_id]
            self._end_early(request)
        elif request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        self._kv_cache.free(request.request_id)
        request.status = status

    def check_integrity(self) -> None:
        """Recount blocks and queues; raises AssertionError on a leak or a misplaced request."""
        self._kv_cache.check_integrity()
        running = {request.request_id for request in self._running}
        early = {request.request_id for request in self._early}
        if not running <= self._kv_cache.owners() <= running | early:
            raise AssertionError(f"blocks of {self._kv_cache.owners()}, but running are {running}, early {early}")
        if not early <= set(self._waiting_for_embeddings):
            raise AssertionError(f"{early} are computed early, but {set(self._waiting_for_embeddings)} wait")
        for queue in (self._running, self._waiting, self._early):
            if sorted(queue, key=_rank) != queue:
                raise AssertionError("a queue is not in the order of ranks")
        for request in self.requests():
            if request.request_id in self._kv_cache.owners():
                self._kv_cache.check_contents(request)
        for request in self.requests():
            if request.status.is_finished:
                raise AssertionError(f"{request} is finished but queued")

    def _enqueue(self, request: EngineRequest) -> None:
        bisect.insort(self._waiting, request, key=_rank)

    def _schedule_decodes(self) -> list[ScheduledChunk]:
        chunks: list[ScheduledChunk] = []
        for request in [r for r in self._running if r.is_decoding]:
            # The last goes first, and we go from first to last, so whoever loses its blocks has no chunk yet.
            while request.status is RequestStatus.RUNNING and not self._grow(request):
                if not self._take_from_early():
                    self._preempt(self._running[-1])
            if request.status is RequestStatus.RUNNING:
                chunks.append(self._decode(request, request.num_computed_tokens))
        return chunks

    def _schedule_prefills(self, chunks: list[ScheduledChunk], budget: int) -> int:
        if len(chunks) == len(self._running):  # all decode
            return budget
        for request in self._running:
            if budget <= 0:
                break
            if not request.is_decoding:
                budget -= self._add_prefill(chunks, request, budget, request.num_tokens)
        return budget

    def _admit(self, chunks: list[ScheduledChunk], budget: int, in_flight: set[bytes]) -> int:
        """Start waiting requests. Returns what is left of the budget for those who stand behind all of them."""
        for request in list(self._waiting):
            if budget <= 0 or len(self._running) >= self.max_num_seqs:
                return 0
            prefix = self._kv_cache.cached_prefix(request)
            if self._kv_cache.first_missing(request, prefix) in in_flight:
                continue
            # The spare blocks keep a newcomer from being preempted again by the next tokens of those before it.
            while not self._kv_cache.admit(request, request.num_tokens, prefix, spare=len(self._running)):
                if not self._take_from_early():
                    return 0  # strictly first come, first served: a smaller one behind it does not overtake
            self._start(request, len(prefix) * self._kv_cache.block_size)
            length = self._add_prefill(chunks, request, budget, request.num_tokens)
            if length == 0:  # an atomic span, for which the next step has room
                return 0
            in_flight.update(self._names(chunks[-1]))
            budget -= length
        return budget

    def _could_admit(self) -> bool:
        """Whether the first of those who wait would be admitted if the next step were decided now."""
        if len(self._running) >= self.max_num_seqs:
            return False
        request = self._waiting[0]
        prefix = self._kv_cache.cached_prefix(request)
        return self._kv_cache.has_room(request.num_tokens, prefix, spare=len(self._running))

    def _start(self, request: EngineRequest, num_cached_tokens: int) -> None:
        self._waiting.remove(request)
        bisect.insort(self._running, request, key=_rank)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_cached_tokens
        if request.num_cached_tokens is None:
            num_cached_tokens = min(num_cached_tokens, request.num_prompt_tokens)  # a resumed answer's may be there too
            request.num_cached_tokens = max(0, num_cached_tokens - request.num_early_tokens)
            if request.reads_prefix_cache:
                self.num_queried_tokens += request.num_prompt_tokens
                self.num_cached_tokens += request.num_cached_tokens

    def _names(self, chunk: ScheduledChunk) -> list[bytes]:
        """What a chunk computes that other requests could use."""
        return self._kv_cache.names_between(chunk.request, chunk.start, chunk.end)

    def _compute_early(self, chunks: list[ScheduledChunk], budget: int, in_flight: set[bytes]) -> None:
        for request in list(self._early):
            if budget <= 0 or len(chunks) >= self.max_num_seqs:
                break
            end = self._early_end(request)
            if not self._kv_cache.has_table(request.request_id):
                prefix = self._kv_cache.cached_prefix(request)
                if len(prefix) * self._kv_cache.block_size >= end:
                    request.early_end = end
                    self._early.remove(request)
                    continue
                if self._kv_cache.first_missing(request, prefix) in in_flight:
                    continue
                if not self._kv_cache.admit(request, end, prefix, spare=len(self._running)):
                    continue
                request.num_computed_tokens = len(prefix) * self._kv_cache.block_size
            length = self._add_prefill(chunks, request, budget, end)
            if length > 0:
                in_flight.update(self._names(chunks[-1]))
            budget -= length

    def _early_end(self, request: EngineRequest) -> int:
        """How far a prompt is computed early: to the end of its last full block, but not into an atomic span."""
        block_size = self._kv_cache.block_size
        end = request.num_known_tokens // block_size * block_size
        while (span := request.atomic_span_around(end)) is not None:
            end = span[0] // block_size * block_size
        return end

    def _end_early(self, request: EngineRequest) -> None:
        """Leave what was computed early, if anything, to the cache."""
        if request in self._early:
            self._early.remove(request)
            self._drop_early(request)

    def _take_from_early(self) -> bool:
        """Have the last in rank of those that are computed early give up its blocks; False: none has any."""
        for request in reversed(self._early):
            if self._kv_cache.has_table(request.request_id):
                self._drop_early(request)
                return True
        return False

    def _drop_early(self, request: EngineRequest) -> None:
        self._kv_cache.free(request.request_id)
        request.num_computed_tokens = 0

    def _add_prefill(self, chunks: list[ScheduledChunk], request: EngineRequest, budget: int, until: int) -> int:
        """Add a chunk of tokens before `until`. Returns its length: 0 if an atomic span must wait for another step."""
        start = request.num_computed_tokens
        end = min(until, start + budget)
        divided = request.atomic_span_around(end)
        if divided is not None:
            is_first = all(chunk.is_decode for chunk in chunks)
            end = divided[1] if divided[0] <= start and is_first else max(divided[0], start)
        if end > start:
            table = tuple(self._kv_cache.block_table(request.request_id))
            chunks.append(ScheduledChunk(request, start, end - start, table, is_last=end == request.num_tokens))
        return end - start

    def _decode(self, request: EngineRequest, start: int) -> ScheduledChunk:
        table = tuple(self._kv_cache.block_table(request.request_id))
        return ScheduledChunk(request, start, 1, table, is_last=True, is_decode=True)

    def _grow(self, request: EngineRequest, spare: int = 0) -> bool:
        return self._kv_cache.grow(request.request_id, request.num_tokens, spare=spare)

    def _preempt(self, request: EngineRequest) -> None:
        self._running.remove(request)
        self._kv_cache.free(request.request_id)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self._enqueue(request)
        self.num_preemptions += 1
        log.info("request %s preempted: out of KV blocks", request.request_id)
