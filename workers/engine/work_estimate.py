"""What the requests of an engine will still take, for those who choose where the next one goes."""

from __future__ import annotations

from collections.abc import Collection

from workers.engine.request import Clock, EngineRequest
from workers.load_model import PrefillDecodeModel

_INTERVAL_S = 0.1
"""The sum over all requests is made anew so often, not in each step."""


class WorkEstimate:
    """Learns from steps and answers; all durations that it gives are milliseconds.

    Args:
        clock: monotonic seconds.
        max_num_seqs: requests in one step at most.
        max_num_batched_tokens: tokens in one step at most.
    """

    def __init__(self, clock: Clock, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._clock = clock
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._durations = PrefillDecodeModel()
        self._work_ms = 0.0
        self._due = 0.0
        """When the work at hand is added up again."""

    def observe_step(self, prefill_tokens: int, decode_tokens: int, duration_s: float) -> None:
        """A step of so many tokens has ended."""
        self._durations.observe_step(prefill_tokens, decode_tokens, duration_s * 1000)

    def observe_answer(self, num_tokens: int) -> None:
        """An answer has ended, neither aborted nor failed."""
        self._durations.observe_answer(num_tokens)

    def work_ms(self, requests: Collection[EngineRequest]) -> float:
        """Of all these, the unfinished ones, together; at most `_INTERVAL_S` old."""
        if not requests:
            self._due = 0.0
            return 0.0
        now = self._clock()
        if now < self._due:
            return self._work_ms
        self._due = now + _INTERVAL_S
        prefill = decode = 0.0
        for request in requests:
            prefill += 0 if request.is_decoding else request.num_uncomputed_tokens
            decode += self._durations.remaining_tokens(request.num_output_tokens, request.max_tokens)
        self._work_ms = self._durations.work_ms(prefill, decode, min(len(requests), self._max_num_seqs))
        return self._work_ms

    @property
    def ms_per_token(self) -> float:
        """Of one more prompt token; 0: nothing learned yet."""
        return self._durations.ms_per_token

    @property
    def largest_step_ms(self) -> float:
        """Of the largest step that there may be; 0: nothing learned yet."""
        if not self.ms_per_token:
            return 0.0
        return self._max_num_batched_tokens * self.ms_per_token + self._durations.step_ms(self._max_num_seqs)
