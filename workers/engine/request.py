"""One request inside the engine: what it asked for, how far it is, and when it got there."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from epd.types import FinishReason, Pooling, PoolingKind, SamplingParams
from workers.engine.grammar import GrammarMatcher
from workers.engine.logits_state import LogitsState

Clock = Callable[[], float]
"""Seconds of a monotonic clock."""


class RequestStatus(IntEnum):
    """In the order of a request's life; everything from `FINISHED_STOPPED` on is final."""

    WAITING_FOR_EMBEDDINGS = 0
    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3
    FINISHED_STOPPED = 4
    FINISHED_LENGTH = 5
    FINISHED_ABORTED = 6
    FINISHED_ERROR = 7

    @property
    def is_finished(self) -> bool:
        """Whether nothing follows."""
        return self >= RequestStatus.FINISHED_STOPPED


FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: FinishReason.STOP,
    RequestStatus.FINISHED_LENGTH: FinishReason.LENGTH,
    RequestStatus.FINISHED_ABORTED: FinishReason.ABORT,
    RequestStatus.FINISHED_ERROR: FinishReason.ERROR,
}


@dataclass(frozen=True)
class ImagePlaceholder:
    """A picture's single placeholder in the prompt as it was sent."""

    content_key: str
    offset: int
    """Index in the prompt token ids; offsets increase."""


@dataclass(frozen=True)
class ImageSpan:
    """Where a picture's tokens stand in the expanded prompt: [offset, offset + length)."""

    content_key: str
    offset: int
    length: int


class EngineRequest:
    """State of one request. Integers only; its tensors live in the model runner.

    `token_ids` is the prompt, later with pictures expanded, followed by everything generated, by an
    engine before this one too. The keys and values of its first `num_computed_tokens` are in the cache. A preemption
    sets that to 0 and nothing else, so that the same tokens are computed again and none is lost or repeated.
    """

    def __init__(
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
        deadline: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Make a request that arrives now.

        Args:
            request_id: unique among the requests of the engine.
            prompt_token_ids: with one placeholder per picture.
            sampling: how to choose tokens and when to end.
            images: the placeholders, by increasing offset.
            resume_token_ids: beginning of the answer, made elsewhere.
            priority: smaller goes first.
            cache_salt: cached prefixes are shared only with requests that have the same one.
            pooling: what to make of the prompt instead of tokens.
            deadline: reading of `clock` after which the request is given up; None: never.
            clock: monotonic seconds.
        """
        self.request_id = request_id
        self.token_ids = [*prompt_token_ids, *resume_token_ids]
        self.sampling = sampling
        self.images = tuple(images)
        self.priority = priority
        self.cache_salt = cache_salt
        self.pooling = pooling
        self.deadline = deadline

        self.sent_token_ids = tuple(prompt_token_ids)
        """The prompt as it came, with placeholders."""
        self.resumed_token_ids = tuple(resume_token_ids)
        """Leading tokens of the answer that were not generated here, and are in no output."""
        self.num_prompt_tokens = len(self.sent_token_ids)
        self._num_expanded_tokens: int | None = None
        self.num_computed_tokens = 0
        self.image_spans: tuple[ImageSpan, ...] = ()
        self.atomic_spans: tuple[tuple[int, int], ...] = ()
        """Half-open ranges of the expanded prompt, rising and disjoint, each of which is computed within one step: its
        tokens see each other in both directions."""
        self.block_names: list[bytes] = []
        """Of its full blocks, as far as they were needed; see `prefix_cache`."""
        takes_mean = pooling is not None and pooling.kind is PoolingKind.MEAN
        self.reads_prefix_cache = sampling.prompt_logprobs is None and not takes_mean
        """Whether it may skip what others computed. Not if something is wanted of every prompt token."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens that others had computed; None before its first step."""
        self.early_end = 0
        """Tokens before this were computed while it waited for embeddings, or found in the cache then."""
        self.num_early_tokens = 0
        """Tokens that it computed while it waited for embeddings."""
        self.max_tokens = sampling.max_tokens or 0
        """Set by the engine once the expanded prompt's length is known."""
        self.ending_token_ids: frozenset[int] = frozenset()
        """Tokens that end the answer; set by the engine, which knows the model's."""

        self.matcher: GrammarMatcher | None = None
        """Set by the engine when the answer has a grammar."""
        self.logits_state: LogitsState | None = None
        """Set by the engine, with the expanded prompt, when `sampling` needs one."""

        self.arrival_order = 0
        """Set by the scheduler; smaller came first."""
        self.num_preemptions = 0
        self._clock = clock
        self._entered: dict[RequestStatus, float] = {}
        self._first_token_at: float | None = None
        self._finished_at: float | None = None
        self.arrived_at = clock()
        self.status = RequestStatus.WAITING_FOR_EMBEDDINGS if images else RequestStatus.WAITING

    def __repr__(self) -> str:
        return f"EngineRequest({self.request_id!r}, {self.status.name}, {self.num_computed_tokens}/{self.num_tokens})"

    @property
    def status(self) -> RequestStatus:
        """Where the request is; setting it stamps the time of the first entry."""
        return self._status

    @status.setter
    def status(self, status: RequestStatus) -> None:
        self._status = status
        now = self._clock()
        self._entered.setdefault(status, now)
        if status.is_finished:
            self._finished_at = now

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Leading tokens that will not change any more: all, unless embeddings are missing."""
        if self.status is not RequestStatus.WAITING_FOR_EMBEDDINGS:
            return self.num_tokens
        return self._num_expanded_tokens or 0

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far, resumed ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache: 1 while decoding."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether a step of it is one token, as opposed to a chunk of prompt (or of a recomputation)."""
        num_tokens = len(self.token_ids)
        return self.num_computed_tokens == num_tokens - 1 and num_tokens > self.num_prompt_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return FINISH_REASONS.get(self.status)

    def set_expanded_prompt(
        self,
        token_ids: Sequence[int],
        spans: Sequence[ImageSpan],
        atomic_spans: Sequence[tuple[int, int]] = (),
        *,
        num_expanded: int | None = None,
    ) -> None:
        """Replace the prompt by the one with pictures expanded. Only before it runs.

        Args:
            token_ids: the prompt.
            spans: where pictures stand in it.
            atomic_spans: see the attribute.
            num_expanded: leading tokens before the first picture that is still missing; None: none is missing.
        """
        self.token_ids = [*token_ids, *self.resumed_token_ids]
        self.num_prompt_tokens = len(token_ids)
        self.image_spans = tuple(spans)
        self.atomic_spans = tuple(atomic_spans)
        self._num_expanded_tokens = num_expanded

    def atomic_span_around(self, index: int) -> tuple[int, int] | None:
        """The atomic span that a cut before token `index` would divide; None: none."""
        before = bisect.bisect_left(self.atomic_spans, (index,)) - 1  # the last that begins before `index`
        if before < 0 or self.atomic_spans[before][1] <= index:
            return None
        return self.atomic_spans[before]

    def append(self, token_id: int) -> None:
        """Add a generated token; the first one stamps the end of prefill."""
        self.token_ids.append(token_id)
        if self._first_token_at is None:
            self._first_token_at = self._clock()

    def timings_ms(self) -> dict[str, float]:
        """Durations of the stages that began, in milliseconds; a stage that did not end runs until the finish.

        `embeddings_wait`: arrival → last embedding; `queue`: ready → first step; `prefill`: first step → first token;
        `decode`: first token → end. Time lost to preemption counts in the stage that it hit.
        """
        end = self._finished_at if self._finished_at is not None else self._clock()
        ready_at = self._entered.get(RequestStatus.WAITING)
        running_at = self._entered.get(RequestStatus.RUNNING)
        marks = [self.arrived_at, ready_at, running_at, self._first_token_at, None]
        timings: dict[str, float] = {}
        for index, stage in enumerate(("embeddings_wait", "queue", "prefill", "decode")):
            start, stop = marks[index], marks[index + 1]
            if start is not None:
                timings[stage] = ((end if stop is None else stop) - start) * 1000
        if not self.images:
            del timings["embeddings_wait"]
        return timings
