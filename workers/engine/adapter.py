"""What differs between model families inside the engine: positions, and how a picture's size maps to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from epd.errors import InvalidRequest, WorkerFailed
from workers.engine.embeddings import ImageEmbeddings
from workers.families import Family, family_of
from workers.model_tasks import is_multimodal

PlacedImage = tuple[int, ImageEmbeddings]
"""Offset in the expanded prompt, and what stands there."""


class PlainPositions:
    """Token i has position i. For text-only models."""

    num_axes = 1
    image_token_id: int | None = None
    deepstack_levels = 0
    """How many of the first layers add something to the hidden states of image tokens."""
    bidirectional_images = False
    """Whether the tokens of a picture also see those behind them."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Adapt to `model`."""
        self.model: Any = model

    def check_grid(self, embeddings: ImageEmbeddings) -> None:
        """Refuse pictures: there is nowhere to put them."""
        raise InvalidRequest("This model takes no images.")

    def prompt_positions(self, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> tuple[torch.Tensor, int]:
        """Positions of a prompt.

        Args:
            token_ids: with pictures expanded.
            images: by increasing offset.

        Returns:
            int64 [num_axes, len(token_ids)], and the difference between position and index of all later tokens.
        """
        return torch.arange(len(token_ids)).expand(self.num_axes, -1), 0

    def model_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Packed positions [num_axes, tokens] as the model's `position_ids`."""
        return positions

    def atomic_spans(self, images: Sequence[PlacedImage]) -> tuple[tuple[int, int], ...]:
        """Half-open token ranges of a prompt whose tokens see one another, so that one step must compute each."""
        if not self.bidirectional_images:
            return ()
        return tuple((offset + start, offset + end) for offset, image in images for start, end in image.runs())


class ImagePositions(PlainPositions):
    """Image tokens are counted like others."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        """Adapt to `model`, which need not have its vision tower."""
        super().__init__(model)
        self.image_token_id = self.model.config.image_token_id
        self.bidirectional_images = family.bidirectional_images
        if family.deepstack:
            self.deepstack_levels = len(self.model.config.vision_config.deepstack_visual_indexes)

    def check_grid(self, embeddings: ImageEmbeddings) -> None:
        """Take any: positions don't depend on it."""


class MRopePositions(ImagePositions):
    """Positions on three axes (time, height, width), as of Qwen2-VL: https://arxiv.org/abs/2409.12191, section 2.1."""

    num_axes = 3

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        """Adapt to `model`, which need not have its vision tower."""
        super().__init__(model, family)
        self._merge = self.model.config.vision_config.spatial_merge_size

    def check_grid(self, embeddings: ImageEmbeddings) -> None:
        """Refuse a picture whose patches do not merge to as many rows as it has, in one run of tokens."""
        time, height, width = grid = embeddings.grid_thw or (0, 0, 0)
        count = embeddings.rows.shape[0]
        whole = min(grid) > 0 and height % self._merge == width % self._merge == 0
        if not whole or time * height * width != count * self._merge**2:
            raise WorkerFailed(f"The encoder sent {count} rows for {time} x {height} x {width} patches.")
        # `get_rope_index` takes each run of image tokens for a picture.
        if embeddings.row_indices[-1] - embeddings.row_indices[0] + 1 != count:
            raise WorkerFailed("The encoder sent a picture whose image tokens are not in one run.")

    def prompt_positions(self, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> tuple[torch.Tensor, int]:
        """See the base class. What is an image token follows from `images`, never from token ids: text may hold one.

        Raises:
            InvalidRequest: two pictures touch, which the model would take for one.
        """
        if not images:
            return super().prompt_positions(token_ids, images)
        kinds = torch.zeros(1, len(token_ids), dtype=torch.int32)
        for offset, embeddings in images:
            first = offset + embeddings.row_indices[0]
            if first > 0 and kinds[0, first - 1] != 0:
                raise InvalidRequest("Two pictures need text between them.", param="messages")
            kinds[0, torch.tensor(embeddings.row_indices) + offset] = 1
        positions, delta = self.model.model.get_rope_index(
            input_ids=torch.tensor([token_ids]),
            mm_token_type_ids=kinds,
            image_grid_thw=torch.tensor([embeddings.grid_thw for _, embeddings in images]),
        )
        return positions[:, 0], int(delta)

    def model_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """[3, tokens] → [3, 1, tokens]."""
        return positions[:, None]


def make_adapter(model: PreTrainedModel, config: PretrainedConfig) -> PlainPositions:
    """The adapter for a model that `load_language_part` returned."""
    if not is_multimodal(config):
        return PlainPositions(model)
    family = family_of(config)
    return MRopePositions(model, family) if family.has_grid else ImagePositions(model, family)
