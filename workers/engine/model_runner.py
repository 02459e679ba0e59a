"""Runs the model on what the scheduler decided: the only place where its integers become tensors, and come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from workers.engine import step_inputs
from workers.engine.adapter import PlacedImage, PlainPositions
from workers.engine.forward import Forward
from workers.engine.pooling import Pooler
from workers.engine.sampler import SamplingRow, sample
from workers.engine.scheduler import ScheduledChunk
from workers.engine.step_inputs import PlacedPrompt
from workers.engine.transfer import to_device


class Runner(Protocol):
    """What the engine needs of a model; tests put a fake here."""

    def add(self, request_id: str, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> None:
        """Learn an expanded prompt before its first step. Raises EPDError when it cannot be positioned."""

    def remove(self, request_id: str) -> None:
        """Forget a request, if known."""

    def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[int]:
        """Compute a step: one token for each chunk that `samples`, in order; `rows` belongs to those.

        May raise anything. The same chunks, or some of them, may then be run again.
        """

    def pooled(self, request_id: str) -> tuple[float, ...]:
        """The vector of a request with pooling, after the step that computed the last token of its prompt."""


class ModelRunner:
    """Turns what the scheduler decided into steps of a model, and their logits into tokens."""

    def __init__(self, forward: Forward, adapter: PlainPositions, device: torch.device) -> None:
        """Run steps by `forward`, on `device`; `adapter` is that of the model."""
        self._forward = forward
        self._adapter = adapter
        self._device = device
        self._prompts: dict[str, PlacedPrompt] = {}
        self._pooler = Pooler(forward.logits)

    def add(self, request_id: str, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> None:
        """See `Runner`."""
        self._prompts[request_id] = PlacedPrompt.of(self._adapter, token_ids, images)

    def remove(self, request_id: str) -> None:
        """See `Runner`."""
        self._prompts.pop(request_id, None)
        self._pooler.remove(request_id)

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[int]:
        """See `Runner`."""
        inputs = step_inputs.build(chunks, self._prompts, self._adapter.num_axes)
        hidden = self._forward.hidden(inputs)
        pools = self._pooler.compute(chunks, hidden)
        tokens: list[int] = []
        if rows:
            (wanted,) = to_device([inputs.wanted], self._device)
            tokens = _sample(self._forward.logits(hidden.index_select(0, wanted)), rows)
        self._pooler.keep(pools)  # last: a step that fails is run again
        return tokens

    def pooled(self, request_id: str) -> tuple[float, ...]:
        """See `Runner`."""
        return self._pooler.result(request_id)


def _sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """As `sample`. Raises ArithmeticError when the model's values overflowed, instead of answering nonsense."""
    tokens = sample(logits, rows)
    # Looking at the chosen ones suffices: NaN compares as the largest.
    if bool(logits[range(len(tokens)), tokens].isnan().any()):
        raise ArithmeticError("the model computed NaN; another --dtype may help, such as bfloat16")
    return tokens
