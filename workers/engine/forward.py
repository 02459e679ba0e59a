"""One step through the model. What runs it (this process, a CUDA graph, several processes) is the caller's choice."""

from __future__ import annotations

from typing import Protocol

import torch

from workers.engine import attention
from workers.engine.attention import AttentionBackend
from workers.engine.language_model import LanguageModel
from workers.engine.step_inputs import StepInputs


class Forward(Protocol):
    """Step inputs to hidden states, and some of those to logits."""

    def hidden(self, inputs: StepInputs) -> torch.Tensor:
        """Store a step's keys and values and compute its final hidden states.

        Args:
            inputs: on the CPU, but for tokens that are unread.

        Returns:
            [tokens, hidden size], on the device. The next call may overwrite it.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of hidden states, [rows, hidden size] → [rows, vocabulary]."""


class LocalForward:
    """The model in this process, called plainly."""

    def __init__(self, model: LanguageModel, backend: AttentionBackend) -> None:
        """Run `model` on the cache of `backend`."""
        self._model = model
        self._backend = backend

    def hidden(self, inputs: StepInputs) -> torch.Tensor:
        """See `Forward`."""
        self._backend.prepare(inputs.chunks)
        there = inputs.to(self._backend.device)
        with attention.use_backend(self._backend):
            return self._model.hidden(self._model.embed(there), there.positions, **self._model.deepstack(there))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Forward`."""
        with attention.use_backend(self._backend):
            return self._model.logits(hidden)
