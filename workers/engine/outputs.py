"""What the engine tells of each step and of itself."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from epd.errors import EPDError, ErrorInfo
from epd.types import FinishReason, TokenLogprobs
from workers.engine.request import EngineRequest
from workers.engine.sampler import Sampled

PromptLogprobs = tuple[TokenLogprobs | None, ...]
"""As in `epd.messages.TokenOutput.prompt_logprobs`; () where none are told."""


class StepOutput(msgspec.Struct, frozen=True):
    """New tokens of one request, or its end; the fields mean what they mean in `epd.messages.TokenOutput`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs = ()
    pooled: tuple[float, ...] = ()
    timings_ms: dict[str, float] = msgspec.field(default_factory=dict)


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
    compiled_steps: int = 0
    """Steps that ran by a compiled graph, since the start."""
    content_keys: tuple[str, ...] = ()
    """Pictures whose embeddings are here; the same object as long as they stay the same."""


def token_output(request: EngineRequest, sampled: Sampled, prompt_logprobs: PromptLogprobs) -> StepOutput:
    """One more token, already appended, of a request that goes on. The first output also tells of the prompt."""
    is_first = request.num_output_tokens == len(request.resumed_token_ids) + 1
    return StepOutput(
        request.request_id,
        (sampled.token_id,),
        prompt_tokens=request.num_prompt_tokens if is_first else 0,
        cached_tokens=(request.num_cached_tokens or 0) if is_first else 0,
        logprobs=_logprobs(sampled),
        prompt_logprobs=prompt_logprobs,
    )


def terminal_output(
    request: EngineRequest,
    *,
    error: EPDError | None,
    sampled: Sampled | None,
    stop_token_id: int | None,
    prompt_logprobs: PromptLogprobs,
    pooled: tuple[float, ...],
) -> StepOutput:
    """The end of a request whose status is final; `sampled` is its last token, if the step made one."""
    return StepOutput(
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


def _logprobs(sampled: Sampled | None) -> tuple[TokenLogprobs, ...]:
    return () if sampled is None or sampled.logprobs is None else (sampled.logprobs,)
