"""Final hidden states of a prompt to one vector, over as many steps as its chunks take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from epd.types import Pooling, PoolingKind
from workers.engine.chunks import ScheduledChunk
from workers.engine.step_inputs import row_slices


@dataclass(frozen=True)
class Pooled:
    """How far a request is."""

    total: torch.Tensor | None = None
    """Sum of the hidden states so far, float32 [hidden size]; only where their mean is asked for."""
    result: tuple[float, ...] = ()
    """Set by the chunk that reaches the end of the prompt."""


class Pooler:
    """Keeps sums and results of requests with pooling.

    A step that fails is run again, so `compute` changes nothing and `keep` is what its caller does last.

    Args:
        score: hidden states [rows, hidden size] → [rows, 1], the model's score head.
    """

    def __init__(self, score: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._score = score
        self._pools: dict[str, Pooled] = {}

    def compute(self, chunks: Sequence[ScheduledChunk], hidden: torch.Tensor) -> dict[str, Pooled]:
        """Pool the rows of those chunks whose requests ask for it.

        Args:
            chunks: of the step.
            hidden: final hidden states of the packed batch, [tokens, hidden size].

        Returns:
            Request id → what to `keep`.

        Raises:
            ArithmeticError: the model's values overflowed.
        """
        pooling = [chunk for chunk in chunks if chunk.request.pooling is not None]
        if not pooling:
            return {}
        rows = row_slices(chunks)
        return {
            chunk.request.request_id: self._pool(chunk, hidden[rows[chunk.request.request_id]]) for chunk in pooling
        }

    def keep(self, pools: dict[str, Pooled]) -> None:
        """Remember what `compute` returned."""
        self._pools.update(pools)

    def result(self, request_id: str) -> tuple[float, ...]:
        """The vector of a request whose prompt is computed."""
        return self._pools[request_id].result

    def remove(self, request_id: str) -> None:
        """Forget a request, if known."""
        self._pools.pop(request_id, None)

    def _pool(self, chunk: ScheduledChunk, hidden: torch.Tensor) -> Pooled:
        pooling = chunk.request.pooling
        assert pooling is not None
        total = None
        if pooling.kind is PoolingKind.MEAN:
            total = hidden.sum(dim=0, dtype=torch.float32)
            if chunk.start > 0:  # after a preemption it is 0 again, and the old sum of no use
                before = self._pools[chunk.request.request_id].total
                assert before is not None
                total += before
        if not chunk.is_last:
            return Pooled(total)
        return Pooled(total, self._finish(pooling, total, hidden[-1:], chunk.end))

    def _finish(
        self, pooling: Pooling, total: torch.Tensor | None, last: torch.Tensor, num_tokens: int
    ) -> tuple[float, ...]:
        if pooling.kind is PoolingKind.SCORE:
            vector = self._score(last)[0].float()
        else:
            vector = last[0].float() if total is None else total / num_tokens
            vector = normalize(vector, dim=0) if pooling.normalize else vector
        if not bool(vector.isfinite().all()):
            raise ArithmeticError("the model computed NaN or infinity; another --dtype may help, such as bfloat16")
        return tuple(vector.tolist())
