"""The language part of a transformers model as two functions: tokens to hidden states, hidden states to logits.

The split lets a step ask for the logits of a few rows, for none, or for the hidden states themselves, and it is the
seam for what runs a step faster than Python calls it: a compiled graph replaces `hidden` and `logits` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from workers.engine.adapter import PlainPositions
from workers.engine.step_inputs import StepInputs
from workers.model_tasks import score_head


@dataclass
class _BodyOutput(MoeModelOutputWithPast):  # type: ignore[misc]  # untyped in transformers
    """With all that any head hands on: how tokens were routed to experts, and the fields of multimodal models."""

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    rope_deltas: torch.Tensor | None = None


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

    @property
    def embedding_weight(self) -> torch.Tensor:
        """[vocabulary, hidden size]."""
        weight: torch.Tensor = self._embed.weight
        return weight

    @property
    def num_parameters(self) -> int:
        """Of everything that was loaded; weights in eight bits are buffers of their layers."""
        rounded = (buffer for name, buffer in self._model.named_buffers() if name.endswith(".weight"))
        return int(self._model.num_parameters() + sum(buffer.numel() for buffer in rounded))

    def embed(self, inputs: StepInputs) -> torch.Tensor:
        """Embeddings of a step's tokens, pictures in place, [tokens, hidden size]."""
        embeds: torch.Tensor = self._embed(inputs.token_ids)
        for image in inputs.images:
            embeds.index_copy_(0, image.targets, image.rows)
        return embeds

    def deepstack(self, inputs: StepInputs) -> dict[str, Any]:
        """What the first layers add to the hidden states of a step's pictures, for `hidden`; empty: nothing."""
        parts = [(image.targets, image.deepstack) for image in inputs.images if image.deepstack is not None]
        if not parts:
            return {}
        mask = torch.zeros(1, len(inputs.token_ids), dtype=torch.bool, device=inputs.token_ids.device)
        mask[0, torch.cat([targets for targets, _ in parts])] = True
        features = torch.cat([features for _, features in parts], dim=1)
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": list(features)}

    def hidden(self, embeds: torch.Tensor, positions: torch.Tensor, **deepstack: Any) -> torch.Tensor:
        """Final hidden states, normalised as the head takes them.

        Args:
            embeds: [tokens, hidden size].
            positions: [axes, tokens].
            deepstack: what the method of that name returns.

        Returns:
            [tokens, hidden size].
        """
        output = self._decoder(
            inputs_embeds=embeds[None],
            position_ids=self.adapter.model_positions(positions),
            use_cache=False,
            **deepstack,
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
        body.forward = lambda *_, **__: _BodyOutput(last_hidden_state=hidden[None])
        try:
            logits: torch.Tensor = self._model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del body.forward  # the class's own is behind it
        return logits

    @torch.inference_mode()
    def _is_all(self, head: Any) -> bool:
        """Whether logits are the output of `head` and nothing more. Calling it alone is faster."""
        size = getattr(head, "in_features", None) or head.weight.shape[1]  # packed weights have shapes of their own
        hidden = torch.linspace(-1, 1, 2 * size).view(2, -1).to(self.embedding_weight)
        return torch.equal(head(hidden), self._whole_head(hidden))
