"""The language part of a transformers model as two functions: tokens to hidden states, hidden states to logits.

The split lets a step ask for the logits of a few rows, for none, or for the hidden states themselves, and it is the
seam for what runs a step faster than Python calls it: a compiled graph replaces `hidden` and `logits` and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from workers.engine.adapter import PlainPositions
from workers.engine.step_inputs import StepInputs
from workers.model_tasks import score_head


class LanguageModel:
    """A model loaded with our attention. Calls run inside `attention.use_backend`."""

    def __init__(self, model: PreTrainedModel, adapter: PlainPositions) -> None:
        """Look up the parts of `model`."""
        self.adapter = adapter
        self._model: Any = model
        self._embed: Any = model.get_input_embeddings()
        self._decoder: Any = model.get_decoder()
        score = score_head(model)
        self._head: Any = model.get_output_embeddings() if score is None else score
        """None when the model gives hidden states and nothing else."""
        self._head_is_all = self._head is score or self._is_all(self._head)

    def embed(self, inputs: StepInputs) -> torch.Tensor:
        """Embeddings of a step's tokens, pictures in place, [tokens, hidden size]."""
        embeds: torch.Tensor = self._embed(inputs.token_ids)
        for image in inputs.images:
            embeds.index_copy_(0, image.targets, image.rows)
        return embeds

    def hidden(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Final hidden states, normalised as the head takes them.

        Args:
            embeds: [tokens, hidden size].
            positions: [axes, tokens].

        Returns:
            [tokens, hidden size].
        """
        output = self._decoder(
            inputs_embeds=embeds[None], position_ids=self.adapter.model_positions(positions), use_cache=False
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden size] → [rows, vocabulary], of a reward model [rows, 1]."""
        logits: torch.Tensor = self._head(hidden) if self._head_is_all else self._whole_head(hidden)
        return logits

    def _whole_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Everything that the model's own forward does behind its body: some families scale or cap their logits."""
        body = self._model.base_model
        # A mixture of experts also asks its body's output for how tokens were routed; others leave that field alone.
        body.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden[None])
        try:
            logits: torch.Tensor = self._model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del body.forward  # the class's own is behind it
        return logits

    @torch.inference_mode()
    def _is_all(self, head: Any) -> bool:
        """Whether logits are the output of `head` and nothing more. Calling it alone is faster."""
        hidden = torch.linspace(-1, 1, 2 * head.weight.shape[1]).view(2, -1).to(head.weight)
        return torch.equal(head(hidden), self._whole_head(hidden))
