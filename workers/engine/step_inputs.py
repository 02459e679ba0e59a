"""From the scheduler's integers to the tensors of one forward call.

A step is one packed row of tokens: those of decoding requests first, short contexts before long ones, then the prompt
chunks. Everything behind this module sees only `StepInputs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from workers.engine.adapter import PlacedImage, PlainPositions
from workers.engine.attention import PackedChunk
from workers.engine.request import EngineRequest
from workers.engine.scheduler import ScheduledChunk
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


@dataclass(frozen=True)
class StepInputs:
    """What one forward call needs."""

    chunks: tuple[PackedChunk, ...]
    """For the attention backend."""
    token_ids: torch.Tensor
    """int64 [tokens]; where a picture stands, its placeholder."""
    positions: torch.Tensor
    """int64 [axes, tokens]."""
    images: tuple[ImageRows, ...]
    """By row."""
    wanted: torch.Tensor
    """int64 [rows whose logits are wanted]: chunk by chunk in the scheduler's order, not in that of the batch."""
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
        return replace(self, token_ids=token_ids, positions=positions, images=images)


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
        chunks: one or more, at most one for each request.
        prompts: request id → prompt, for each of them.
        num_axes: of positions.
        unread: has the tokens of the chunks, of one token each, which the host does not know yet.
    """
    places = [_with_spans(chunk, place, prompts[chunk.request.request_id]) for chunk, place in _pack(chunks)]
    token_ids = _token_ids(places) if unread is None else unread.of(chunk.request for chunk, _ in places)
    return StepInputs(
        chunks=tuple(place for _, place in places),
        token_ids=token_ids,
        positions=_positions(places, prompts, num_axes, len(token_ids)),
        images=tuple(
            rows for chunk, place in places for rows in _images(chunk, place, prompts[chunk.request.request_id])
        ),
        wanted=torch.tensor(_wanted(chunks, places), dtype=torch.int64),
        is_unread=unread is not None,
    )


def wanted_offsets(chunk: ScheduledChunk) -> Sequence[int]:
    """Tokens of a chunk whose logits are wanted, counted from its first: the last one where the chunk samples."""
    return (chunk.length - 1,) if chunk.samples else ()


def row_slices(chunks: Sequence[ScheduledChunk]) -> dict[str, slice]:
    """Request id → rows of the packed batch that `build` gives its chunk."""
    return {chunk.request.request_id: place.rows for chunk, place in _pack(chunks)}


def _pack(chunks: Sequence[ScheduledChunk]) -> list[Place]:
    """Give each chunk its rows: those of one token first, short contexts before long ones."""
    places: list[Place] = []
    first_row = 0
    for chunk in sorted(chunks, key=lambda chunk: (chunk.length > 1, chunk.end)):
        places.append((chunk, PackedChunk(first_row, chunk.length, chunk.start, chunk.block_table)))
        first_row += chunk.length
    return places


def _token_ids(places: Sequence[Place]) -> torch.Tensor:
    token_ids = [token for chunk, _ in places for token in chunk.request.token_ids[chunk.start : chunk.end]]
    return torch.tensor(token_ids, dtype=torch.int64)


def _with_spans(chunk: ScheduledChunk, place: PackedChunk, prompt: PlacedPrompt) -> Place:
    if not prompt.bidirectional or chunk.start >= prompt.length:
        return chunk, place
    spans = tuple(span for span in prompt.bidirectional if chunk.start <= span[0] and span[1] <= chunk.end)
    return chunk, replace(place, bidirectional=spans)


def _wanted(chunks: Sequence[ScheduledChunk], places: Sequence[Place]) -> list[int]:
    first_rows = {chunk.request.request_id: place.first_row for chunk, place in places}
    return [first_rows[chunk.request.request_id] + offset for chunk in chunks for offset in wanted_offsets(chunk)]


def _positions(
    places: Sequence[Place], prompts: dict[str, PlacedPrompt], num_axes: int, num_tokens: int
) -> torch.Tensor:
    decoding = []
    for chunk, _ in places:  # those come first
        prompt = prompts[chunk.request.request_id]
        if chunk.length > 1 or chunk.start < prompt.length:
            break
        decoding.append(chunk.start + prompt.delta)
    if len(decoding) == num_tokens:
        return torch.tensor(decoding).expand(num_axes, -1)
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
