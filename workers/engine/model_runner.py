"""Runs the model on what the scheduler decided: the only place where its integers become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from workers.engine import attention
from workers.engine.adapter import PlacedImage, PlainPositions
from workers.engine.attention import AttentionBackend, PackedChunk
from workers.engine.sampler import SamplingRow, sample
from workers.engine.scheduler import ScheduledChunk


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


@dataclass(frozen=True)
class _Prompt:
    positions: torch.Tensor
    """[axes, prompt tokens]."""
    delta: int
    images: tuple[PlacedImage, ...]

    def images_after(self, start: int) -> tuple[PlacedImage, ...]:
        """Pictures that may have rows at or after token `start`: none while decoding."""
        return self.images if start < self.positions.shape[1] else ()

    def positions_of(self, start: int, end: int) -> torch.Tensor:
        """Positions of tokens [start, end), prompt or generated, [axes, end - start]."""
        axes, length = self.positions.shape
        parts = []
        if start < length:
            parts.append(self.positions[:, start:end])
        if end > length:
            parts.append(torch.arange(max(start, length), end).add(self.delta).expand(axes, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class ModelRunner:
    """The transformers model with our attention."""

    def __init__(self, model: PreTrainedModel, adapter: PlainPositions, backend: AttentionBackend) -> None:
        """Run `model`, loaded with `attn_implementation=attention.ATTENTION_NAME`."""
        self._model: Any = model
        self._embed = model.get_input_embeddings()
        self._adapter = adapter
        self._backend = backend
        self._device = backend.device
        self._prompts: dict[str, _Prompt] = {}

    def add(self, request_id: str, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> None:
        """See `Runner`."""
        positions, delta = self._adapter.prompt_positions(token_ids, images)
        self._prompts[request_id] = _Prompt(positions, delta, tuple(images))

    def remove(self, request_id: str) -> None:
        """See `Runner`."""
        self._prompts.pop(request_id, None)

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[int]:
        """See `Runner`."""
        packed = _pack(chunks)
        self._backend.prepare([place for _, place in packed])
        embeds, positions = self._inputs(packed)
        # By chunk, not by row: `rows` is in the scheduler's order, the batch is packed in the backend's.
        last_rows = {chunk.request.request_id: place.rows.stop - 1 for chunk, place in packed}
        wanted = [last_rows[chunk.request.request_id] for chunk in chunks if chunk.samples]
        with attention.use_backend(self._backend):
            output = self._model(
                inputs_embeds=embeds[None],
                position_ids=self._adapter.model_positions(positions),
                use_cache=False,
                logits_to_keep=torch.tensor(wanted, dtype=torch.int64, device=self._device),
            )
        return _sample(output.logits[0], rows) if rows else []

    def _inputs(self, packed: list[tuple[ScheduledChunk, PackedChunk]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [tokens, hidden size] and positions [axes, tokens] of the packed batch."""
        token_ids = [token for chunk, _ in packed for token in chunk.request.token_ids[chunk.start : chunk.end]]
        embeds: torch.Tensor = self._embed(torch.tensor(token_ids, device=self._device))
        positions = []
        for chunk, place in packed:
            prompt = self._prompts[chunk.request.request_id]
            positions.append(prompt.positions_of(chunk.start, chunk.end))
            for offset, image in prompt.images_after(chunk.start):
                indices, image_rows = image.rows_between(chunk.start - offset, chunk.end - offset)
                if indices:
                    shift = offset - chunk.start + place.first_row
                    target = torch.tensor(indices, device=self._device) + shift
                    embeds.index_copy_(0, target, image_rows.to(self._device))
        return embeds, torch.cat(positions, dim=1).to(self._device)


def _sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """As `sample`. Raises ArithmeticError when the model's values overflowed, instead of answering nonsense."""
    tokens = sample(logits, rows)
    # Looking at the chosen ones suffices: NaN compares as the largest.
    if bool(logits[range(len(tokens)), tokens].isnan().any()):
        raise ArithmeticError("the model computed NaN; another --dtype may help, such as bfloat16")
    return tokens


def _pack(chunks: Sequence[ScheduledChunk]) -> list[tuple[ScheduledChunk, PackedChunk]]:
    """Give each chunk its rows: those of one token first, short contexts before long ones."""
    packed: list[tuple[ScheduledChunk, PackedChunk]] = []
    first_row = 0
    for chunk in sorted(chunks, key=lambda chunk: (chunk.length > 1, chunk.end)):
        packed.append((chunk, PackedChunk(first_row, chunk.length, chunk.start, chunk.block_table)))
        first_row += chunk.length
    return packed
