"""Log probabilities of tokens, of the model's own distribution: before temperature, penalties and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from epd.types import TokenLogprobs
from workers.engine.chunks import ScheduledChunk
from workers.engine.step_inputs import row_slices

_MOST_TOP = 20
"""Most likely tokens that a request may ask for."""
_ROWS_AT_ONCE = 32
"""Prompt rows go through the head so many at a time: a whole chunk times a vocabulary is gigabytes."""


def logprobs_of(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Look up one token a row, and the most likely ones.

    Args:
        logits: [rows, vocabulary], as the model made them.
        token_ids: the token of each row.
        num_top: how many of the most likely ones each row wants, possibly none.

    Raises:
        ArithmeticError: a logit that is looked at is no number.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logits > chosen).sum(dim=-1) + 1
    # Always as many, for the same ones to be listed whatever others ask for.
    best, best_ids = most_likely(logits, min(max(_MOST_TOP, *num_top), logits.shape[1]) if any(num_top) else 0)
    values = (chosen - total).squeeze(1)
    if bool(values.isnan().any()):
        raise ArithmeticError("the model computed NaN; another --dtype may help, such as bfloat16")
    top = zip((best - total).tolist(), best_ids.tolist(), strict=True)
    return [
        TokenLogprobs(token, value, rank, tuple(zip(ids[:count], scores[:count], strict=True)))
        for token, value, rank, count, (scores, ids) in zip(
            token_ids, values.tolist(), ranks.tolist(), num_top, top, strict=True
        )
    ]


def most_likely(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best of each row: scores, falling, and token ids, rising among equals.

    Of those that equal the worst of them, some may be missing. In bfloat16 there are many equals, and without an order
    it would depend on `count`, and so on the batch, which come first.
    """
    ids = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    scores, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return scores, ids.gather(1, order)


class PromptLogprobs:
    """Collects log probabilities of prompts, chunk by chunk.

    A step that fails is run again, so `compute` changes nothing and `keep` is what its caller does last.

    Args:
        head: hidden states [rows, hidden size] → logits [rows, vocabulary].
    """

    def __init__(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._head = head
        self._known: dict[str, list[TokenLogprobs]] = {}

    def compute(self, chunks: Sequence[ScheduledChunk], hidden: torch.Tensor) -> dict[str, list[TokenLogprobs]]:
        """Look at the chunks of those requests that ask for it and have no token yet.

        Args:
            chunks: of the step. Of each such request they come one after the other, from token 0 on.
            hidden: final hidden states of the packed batch, [tokens, hidden size].

        Returns:
            Request id → what to `keep`: all that is known of it with this step.
        """
        asking = [chunk for chunk in chunks if _asks(chunk)]
        if not asking:
            return {}
        slices = row_slices(chunks)
        return {chunk.request.request_id: self._of_chunk(chunk, hidden, slices) for chunk in asking}

    def keep(self, known: dict[str, list[TokenLogprobs]]) -> None:
        """Remember what `compute` returned."""
        self._known.update(known)

    def take(self, request_id: str) -> tuple[TokenLogprobs, ...] | None:
        """Those of tokens 1, 2, … of a prompt as far as it is computed, once; None: nothing is, or they are taken."""
        known = self._known.pop(request_id, None)
        return None if known is None else tuple(known)

    def remove(self, request_id: str) -> None:
        """Forget a request, if known."""
        self._known.pop(request_id, None)

    def _of_chunk(self, chunk: ScheduledChunk, hidden: torch.Tensor, slices: dict[str, slice]) -> list[TokenLogprobs]:
        request = chunk.request
        first_row = slices[request.request_id].start
        next_tokens = request.token_ids[chunk.start + 1 : min(chunk.end + 1, request.num_prompt_tokens)]
        # After a preemption the prompt starts again, and what was known of it is of no use.
        known = list(self._known[request.request_id]) if chunk.start > 0 else []
        num_top = request.sampling.prompt_logprobs or 0
        return known + self._look_up(hidden[first_row : first_row + len(next_tokens)], next_tokens, num_top)

    def _look_up(self, hidden: torch.Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        for start in range(0, len(token_ids), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            tokens = token_ids[part]
            found += logprobs_of(self._head(hidden[part]), tokens, [num_top] * len(tokens))
        return found


def _asks(chunk: ScheduledChunk) -> bool:
    request = chunk.request
    return (
        request.sampling.prompt_logprobs is not None
        and request.pooling is None
        and request.num_output_tokens == 0  # else this is a computation again, and they are delivered
    )
