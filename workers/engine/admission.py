"""What the engine takes from outside, checked against the model before anything is queued for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from epd.errors import ContextLengthExceeded, InvalidRequest
from epd.types import Pooling, SamplingParams
from workers.engine.embeddings import ImageEmbeddings
from workers.engine.model_loader import ModelInfo
from workers.engine.request import ImagePlaceholder

_LONGEST_TIMEOUT_S = 24 * 3600.0


def check_prompt(info: ModelInfo, token_ids: Sequence[int], images: Sequence[ImagePlaceholder]) -> None:
    """Refuse a prompt that cannot be for this model; raises InvalidRequest."""
    if not token_ids:
        raise InvalidRequest("The prompt is empty.", param="messages")
    if min(token_ids) < 0 or max(token_ids) >= info.vocab_size:
        raise InvalidRequest("The prompt has token ids outside the vocabulary.", param="messages")
    if images and info.adapter.image_token_id is None:
        raise InvalidRequest("This model takes no images.", param="messages")
    offsets = [-1, *(image.offset for image in images), len(token_ids)]
    if any(left >= right for left, right in itertools.pairwise(offsets)):
        raise InvalidRequest("Picture offsets must increase and lie in the prompt.", param="images")


def check_resumed(info: ModelInfo, token_ids: Sequence[int], ending: frozenset[int], pooling: Pooling | None) -> None:
    """Refuse the beginning of an answer that cannot be this model's to this request; raises InvalidRequest."""
    if not token_ids:
        return
    if pooling is not None:
        raise InvalidRequest("A vector can't be resumed.", param="resume_token_ids")
    if min(token_ids) < 0 or max(token_ids) >= info.vocab_size:
        raise InvalidRequest("Token ids outside the vocabulary.", param="resume_token_ids")
    if not ending.isdisjoint(token_ids[:-1]):
        raise InvalidRequest("The answer goes on behind a token that ends it.", param="resume_token_ids")


def tokens_to_generate(limit: int, num_prompt_tokens: int, sampling: SamplingParams, pooling: Pooling | None) -> int:
    """How many tokens a request may generate in a context of `limit` tokens.

    Raises:
        InvalidRequest: the request wants a negative number.
        ContextLengthExceeded: they, or one, do not fit.
    """
    if pooling is not None:
        if num_prompt_tokens > limit:
            raise ContextLengthExceeded.of(limit=limit, prompt=num_prompt_tokens, completion=None)
        return 0
    if sampling.max_tokens is not None and sampling.max_tokens < 0:
        raise InvalidRequest("max_tokens must not be negative.", param="max_tokens")
    wanted = None if sampling.fits_context and sampling.max_tokens else sampling.max_tokens
    if num_prompt_tokens + (1 if wanted is None else wanted) > limit:
        raise ContextLengthExceeded.of(limit=limit, prompt=num_prompt_tokens, completion=wanted)
    left = limit - num_prompt_tokens
    return left if sampling.max_tokens is None else min(sampling.max_tokens, left)


def ending_token_ids(info: ModelInfo, sampling: SamplingParams) -> frozenset[int]:
    """Tokens that end the request's answer."""
    eos = frozenset() if sampling.ignore_eos else info.eos_token_ids
    # A checkpoint may name an end outside its own vocabulary: masking that one would fail the whole step.
    return frozenset(token for token in eos.union(sampling.stop_token_ids) if 0 <= token < info.vocab_size)


def checked_embeddings(
    info: ModelInfo, token_ids: Sequence[int], grid_thw: tuple[int, int, int] | None, rows: torch.Tensor
) -> ImageEmbeddings:
    """Embeddings as this model takes them.

    Raises:
        InvalidRequest: it takes none.
        ContextLengthExceeded: the picture alone is longer than the context.
        WorkerFailed: they are not for this model.
    """
    if info.adapter.image_token_id is None:
        raise InvalidRequest("This model takes no images.")
    if len(token_ids) > info.max_model_len:  # the store counts rows alone; there may be many other tokens
        raise ContextLengthExceeded.of(limit=info.max_model_len, prompt=len(token_ids), completion=None)
    embeddings = ImageEmbeddings.checked(
        token_ids,
        grid_thw,
        rows,
        image_token_id=info.adapter.image_token_id,
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        dtype=info.dtype,
        deepstack_levels=info.adapter.deepstack_levels,
    )
    info.adapter.check_grid(embeddings)
    return embeddings


def deadline_in(timeout_s: float | None, now: float) -> float | None:
    """Clock reading of a deadline. Raises InvalidRequest for NaN."""
    if timeout_s is None:
        return None
    if math.isnan(timeout_s):
        raise InvalidRequest("timeout_s is not a number.", param="timeout_s")
    # Clocks and waits of the system take no infinity.
    return now + min(timeout_s, _LONGEST_TIMEOUT_S)
