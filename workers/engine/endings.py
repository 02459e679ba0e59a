"""Whether a request's answer is whole, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass

from epd.errors import EPDError
from workers.engine import grammar
from workers.engine.request import EngineRequest, RequestStatus


@dataclass(frozen=True)
class Ending:
    """Of an answer that is whole."""

    status: RequestStatus
    error: EPDError | None = None
    stop_token_id: int | None = None
    """The token that ended the answer, when one did."""


def ending_of(request: EngineRequest) -> Ending | None:
    """How the answer ends with its last token; None: it goes on."""
    token, state = request.token_ids[-1], request.logits_state
    if token in request.ending_token_ids:
        return stopped(request, token)
    if state is not None and state.is_complete:  # without asking the model for an end
        return stopped(request)
    if request.num_output_tokens >= request.max_tokens:
        return Ending(RequestStatus.FINISHED_LENGTH)
    return None


def stopped(request: EngineRequest, stop_token_id: int | None = None) -> Ending:
    """The answer is whole, or its grammar failed: that looks the same to the sampler."""
    state = request.logits_state
    reason = None if state is None or state.matcher is None else state.matcher.error
    if reason is not None:
        return Ending(RequestStatus.FINISHED_ERROR, error=grammar.unusable(reason))
    return Ending(RequestStatus.FINISHED_STOPPED, stop_token_id=stop_token_id)
