"""What a prefill-decode worker counts and measures of the requests that it has answered."""

from __future__ import annotations

from collections import defaultdict

from epd.messages import StageStats, TokenOutput
from epd.observability import Stage, StageRecorder
from epd.types import FinishReason


class AnswerFigures:
    """Requests by outcome, their tokens, how many pictures needed no encoder, and how long the stages took."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = defaultdict(int)
        self._stages = StageRecorder()

    def stages(self) -> dict[str, StageStats]:
        """Durations of the requests that ended well."""
        return self._stages.snapshot()

    def note_end(self, output: TokenOutput, num_tokens: int) -> None:
        """Count a request that ended with this output, after so many tokens."""
        self.counters[f"requests_{output.finish_reason}"] += 1
        self.counters["prompt_tokens"] += output.prompt_tokens
        self.counters["generated_tokens"] += num_tokens
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._measure(output.timings_ms, num_tokens)

    def note_expected(self, num_expected: int, num_missing: int) -> None:
        """Count pictures whose embeddings the proxy expected here, and of them those that are not here any more."""
        self.counters["pd_embedding_cache_hits"] += num_expected - num_missing
        self.counters["pd_embedding_cache_misses"] += num_missing

    def _measure(self, timings_ms: dict[str, float], num_tokens: int) -> None:
        for stage, duration_ms in timings_ms.items():
            self._stages.observe(stage, duration_ms)
        until_first = timings_ms.get(Stage.QUEUE, 0.0) + timings_ms.get(Stage.PREFILL, 0.0)
        decode = timings_ms.get(Stage.DECODE, 0.0)
        self._stages.observe(Stage.TTFT, until_first)
        self._stages.observe(Stage.E2E, until_first + decode)
        if num_tokens > 1:
            self._stages.observe(Stage.TPOT, decode / (num_tokens - 1))
