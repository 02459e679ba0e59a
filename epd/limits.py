"""What both the proxy and the engine refuse, so that it fits into a message."""

from __future__ import annotations

from epd.errors import InvalidRequest
from epd.types import SamplingParams

MAX_PROMPT_LOGPROBS = 1 << 18
"""Log probabilities of one prompt: they travel in one message."""


def check_prompt_logprobs(sampling: SamplingParams, prompt_tokens: int) -> None:
    """Check that the log probabilities of a prompt are not too many.

    The proxy does so before anything is computed, the engine when it knows how many tokens the pictures take.

    Raises:
        InvalidRequest: they are.
    """
    top = sampling.prompt_logprobs
    if top is not None and prompt_tokens * (1 + top) > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"{1 + top} log probabilities for each of {prompt_tokens} prompt tokens are more than "
            f"{MAX_PROMPT_LOGPROBS}; ask for fewer, or send a shorter prompt.",
            param="prompt_logprobs",
        )
