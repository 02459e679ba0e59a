"""What the engine tells of each step and of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from epd.errors import ErrorInfo
from epd.types import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class StepOutput:
    """New tokens of one request, or its end; the fields mean what they mean in `epd.messages.TokenOutput`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    pooled: tuple[float, ...] = ()
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine is."""

    running: int
    waiting: int
    kv_used_blocks: int
    kv_total_blocks: int
    prefix_cache_queries: int = 0
    """Prompt tokens that were looked for in the prefix cache, since the start."""
    prefix_cache_hits: int = 0
    """Those of them that were found."""
    preemptions: int = 0
    """How often a request lost its blocks, since the start."""
    work_ms: float = 0.0
    """What all requests at hand will still take, as learned."""
    ms_per_token: float = 0.0
    """What one more prompt token takes; 0: nothing learned yet."""
    largest_step_ms: float = 0.0
    """What the largest step that there may be takes; 0: nothing learned yet."""
