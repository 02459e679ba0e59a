"""From the scheduler's integers to the tensors of one forward call.

A step is one packed row of tokens, chunk by chunk, `in_batch_order`. Everything behind this module sees only
`StepInputs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch

from workers.engine.adapter import PlacedImage, PlainPositions
from workers.engine.attention import PackedChunk
from workers.engine.chunks import ScheduledChunk
from workers.engine.request import EngineRequest
from workers.engine.transfer import large_to_device, to_device

Place = tuple[ScheduledChunk, PackedChunk]


@dataclass(frozen=True)
class PlacedPrompt:
    """An expanded prompt with what depends on the prompt alone, kept while its request is unfinished."""

    positions: torch.Tensor
    """int64 [axes, prompt tokens]."""
    delta: int
    """Position minus index of every token behind the prompt, the same on all axes."""
    images: tuple[PlacedImage, ...]
    bidirectional: tuple[tuple[int, int], ...] = ()
    """Half-open token ranges whose tokens see one another in both directions; no chunk has a part of one."""

    @classmethod
    def of(cls, adapter: PlainPositions, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> PlacedPrompt:
        """Ask the adapter. Raises EPDError when the prompt cannot be positioned."""
        positions, delta = adapter.prompt_positions(token_ids, images)
        return cls(positions, delta, tuple(images), adapter.atomic_spans(images))

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.positions.shape[1]

    def images_after(self, start: int) -> tuple[PlacedImage, ...]:
        """Pictures that may have rows at or after token `start`: none while decoding."""
        return self.images if start < self.length else ()

    def write_positions(self, start: int, end: int, target: torch.Tensor) -> None:
        """Write the positions of tokens [start, end), prompt or generated, to `target` [axes, end - start]."""
        in_prompt = max(0, min(self.length, end) - start)
        target[:, :in_prompt] = self.positions[:, start : start + in_prompt]
        if in_prompt < end - start:
            target[:, in_prompt:] = torch.arange(start + in_prompt, end) + self.delta


@dataclass(frozen=True)
class ImageRows:
    """Embeddings that take the place of token embeddings in one chunk."""

    targets: torch.Tensor
    """int64 [rows], rows of the packed batch."""
    rows: torch.Tensor
    """[rows, hidden size]."""
    deepstack: torch.Tensor | None = None
    """[levels, rows, hidden size]: added to the hidden states behind each of the first layers."""


class StepInputs(msgspec.Struct, frozen=True):
    """What one forward call needs."""

    chunks: tuple[PackedChunk, ...]
    """For the attention backend."""
    token_ids: torch.Tensor
    """int64 [tokens]; where a picture stands, its placeholder."""
    positions: torch.Tensor
    """int64 [axes, tokens]."""
    images: tuple[ImageRows, ...]
    """By row."""
    wanted: torch.Tensor | None
    """int64 [rows whose logits are wanted], rising; None where answers are all that is computed: all rows are."""
    is_unread: bool = False
    """Whether `token_ids` are on the device already, where the step before makes them; the host does not know them."""

    @property
    def is_decode_only(self) -> bool:
        """Whether every chunk is one token, and none a picture's."""
        return len(self.chunks) == self.token_ids.shape[0] and not self.images

    def to(self, device: torch.device) -> StepInputs:
        """What the model takes of it on `device`; `wanted` stays. Does not wait for the copies."""
        known = [] if self.is_unread else [self.token_ids]
        positions, *moved = to_device([self.positions, *(image.targets for image in self.images), *known], device)
        token_ids = self.token_ids if self.is_unread else moved.pop()
        images = tuple(
            replace(
                image,
                targets=targets,
                rows=large_to_device(image.rows, device),
                deepstack=None if image.deepstack is None else large_to_device(image.deepstack, device),
            )
            for image, targets in zip(self.images, moved, strict=True)
        )
        return msgspec.structs.replace(self, token_ids=token_ids, positions=positions, images=images)


@dataclass(frozen=True)
class UnreadTokens:
    """What a step samples, before the host has read it."""

    tokens: torch.Tensor
    """int64 [rows], on the device."""
    row_of: Mapping[str, int]
    """Request id → row."""

    def of(self, requests: Iterable[EngineRequest]) -> torch.Tensor:
        """The tokens of these requests, in this order. Waits for nothing."""
        rows = torch.tensor([self.row_of[request.request_id] for request in requests], dtype=torch.int64)
        (there,) = to_device([rows], self.tokens.device)
        return self.tokens.index_select(0, there)


def build(
    chunks: Sequence[ScheduledChunk],
    prompts: dict[str, PlacedPrompt],
    num_axes: int,
    unread: UnreadTokens | None = None,
) -> StepInputs:
    """Pack the chunks of a step, on the CPU but for `unread` tokens.

    Args:
        chunks: one or more, at most one for each request, `in_batch_order`.
        prompts: request id → prompt, for each of them.
        num_axes: of positions.
        unread: has the tokens of the chunks, of one token each, which the host does not know yet.
    """
    if all(chunk.is_decode for chunk in chunks):
        return _build_decodes(chunks, prompts, num_axes, unread)
    assert unread is None, "a step with prompts is launched when all tokens are known"
    places = [_with_spans(chunk, place, prompts[chunk.request.request_id]) for chunk, place in _pack(chunks)]
    token_ids = [token for chunk in chunks for token in chunk.request.token_ids[chunk.start : chunk.end]]
    return StepInputs(
        chunks=tuple(place for _, place in places),
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=_positions(places, prompts, num_axes, len(token_ids)),
        images=tuple(
            rows for chunk, place in places for rows in _images(chunk, place, prompts[chunk.request.request_id])
        ),
        wanted=torch.tensor([place.rows.stop - 1 for chunk, place in places if chunk.samples], dtype=torch.int64),
    )


def _build_decodes(
    chunks: Sequence[ScheduledChunk], prompts: dict[str, PlacedPrompt], num_axes: int, unread: UnreadTokens | None
) -> StepInputs:
    """The short way of a step of answers alone, of which there are many, each soon over."""
    positions = np.empty((num_axes, len(chunks)), dtype=np.int64)
    positions[:] = [chunk.start + prompts[chunk.request.request_id].delta for chunk in chunks]
    if unread is None:
        token_ids = torch.from_numpy(np.array([chunk.request.token_ids[chunk.start] for chunk in chunks], np.int64))
    else:
        token_ids = unread.of(chunk.request for chunk in chunks)
    return StepInputs(
        chunks=tuple([PackedChunk(row, 1, chunk.start, chunk.block_table) for row, chunk in enumerate(chunks)]),
        token_ids=token_ids,
        positions=torch.from_numpy(positions),
        images=(),
        wanted=None,
        is_unread=unread is not None,
    )


def row_slices(chunks: Sequence[ScheduledChunk]) -> dict[str, slice]:
    """Request id → rows of the packed batch that `build` gives its chunk."""
    return {chunk.request.request_id: place.rows for chunk, place in _pack(chunks)}


def _pack(chunks: Sequence[ScheduledChunk]) -> list[Place]:
    """Give each chunk its rows."""
    places: list[Place] = []
    first_row = 0
    for chunk in chunks:
        places.append((chunk, PackedChunk(first_row, chunk.length, chunk.start, chunk.block_table)))
        first_row += chunk.length
    return places


def _with_spans(chunk: ScheduledChunk, place: PackedChunk, prompt: PlacedPrompt) -> Place:
    if not prompt.bidirectional or chunk.start >= prompt.length:
        return chunk, place
    spans = tuple(span for span in prompt.bidirectional if chunk.start <= span[0] and span[1] <= chunk.end)
    return chunk, msgspec.structs.replace(place, bidirectional=spans)


def _positions(
    places: Sequence[Place], prompts: dict[str, PlacedPrompt], num_axes: int, num_tokens: int
) -> torch.Tensor:
    # Most of one token, which come first, are decodes: together, they take one operation.
    decodes = itertools.takewhile(lambda place: place[0].is_decode, places)
    decoding = [chunk.start + prompts[chunk.request.request_id].delta for chunk, _ in decodes]
    positions = torch.empty(num_axes, num_tokens, dtype=torch.int64)
    positions[:, : len(decoding)] = torch.tensor(decoding, dtype=torch.int64)
    for chunk, place in places[len(decoding) :]:
        prompts[chunk.request.request_id].write_positions(chunk.start, chunk.end, positions[:, place.rows])
    return positions


def _images(chunk: ScheduledChunk, place: PackedChunk, prompt: PlacedPrompt) -> list[ImageRows]:
    found = []
    for offset, image in prompt.images_after(chunk.start):
        rows = image.rows_between(chunk.start - offset, chunk.end - offset)
        if rows.start == rows.stop:
            continue
        targets = torch.tensor(image.row_indices[rows]) + (offset - chunk.start + place.first_row)
        found.append(
            ImageRows(targets, image.rows[rows], None if image.deepstack is None else image.deepstack[:, rows])
        )
    return found
