"""Runs the model on what the scheduler decided: the only place where its integers become tensors, and come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from workers.engine import attention, step_inputs
from workers.engine.adapter import PlacedImage
from workers.engine.attention import AttentionBackend
from workers.engine.language_model import LanguageModel
from workers.engine.sampler import SamplingRow, sample
from workers.engine.scheduler import ScheduledChunk
from workers.engine.step_inputs import PlacedPrompt, StepInputs


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


class ModelRunner:
    """The transformers model with our attention."""

    def __init__(self, model: LanguageModel, backend: AttentionBackend) -> None:
        """Run `model`, loaded with `attn_implementation=attention.ATTENTION_NAME`."""
        self._model = model
        self._backend = backend
        self._prompts: dict[str, PlacedPrompt] = {}

    def add(self, request_id: str, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> None:
        """See `Runner`."""
        self._prompts[request_id] = PlacedPrompt.of(self._model.adapter, token_ids, images)

    def remove(self, request_id: str) -> None:
        """See `Runner`."""
        self._prompts.pop(request_id, None)

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[int]:
        """See `Runner`."""
        inputs = step_inputs.build(chunks, self._prompts, self._model.adapter.num_axes, self._backend.device)
        logits = self._logits(inputs)
        return _sample(logits, rows) if rows else []

    def _logits(self, inputs: StepInputs) -> torch.Tensor:
        """Logits of the wanted rows, [len(inputs.wanted), vocabulary]."""
        self._backend.prepare(inputs.chunks)
        with attention.use_backend(self._backend):
            hidden = self._model.hidden(self._model.embed(inputs), inputs.positions)
            return self._model.logits(hidden.index_select(0, inputs.wanted))


def _sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """As `sample`. Raises ArithmeticError when the model's values overflowed, instead of answering nonsense."""
    tokens = sample(logits, rows)
    # Looking at the chosen ones suffices: NaN compares as the largest.
    if bool(logits[range(len(tokens)), tokens].isnan().any()):
        raise ArithmeticError("the model computed NaN; another --dtype may help, such as bfloat16")
    return tokens
