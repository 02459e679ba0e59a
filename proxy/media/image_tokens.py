"""How many prompt tokens a picture takes, from its size alone, where the checkpoint's processor settings tell.

Encoders know it for every family, from the pixels. This is for counting before anything is encoded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from epd.checkpoint import read_json

ImageTokens = Callable[[int, int], int]
"""(width, height) in pixels → prompt tokens that stand where the placeholder was."""

_QWEN_VL = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"})


def image_tokens_of(model: Path) -> ImageTokens | None:
    """The rule of a checkpoint; None: its settings do not tell."""
    kind = read_json(model, "config.json").get("model_type")
    processor = read_json(model, "processor_config.json")
    nested = processor.get("image_processor")  # where newer checkpoints keep what has a file of its own in others
    settings = (nested if isinstance(nested, dict) else {}) | read_json(model, "preprocessor_config.json")
    try:
        if kind in _QWEN_VL:
            return msgspec.convert(settings, _QwenVL).tokens
        if kind == "llava":
            return partial(_fixed, msgspec.convert(settings | processor, _Llava).tokens)
        if kind == "gemma3" and not settings.get("do_pan_and_scan"):
            # Between the tokens of the picture and the line breaks around them stand a beginning and an end.
            return partial(_fixed, msgspec.convert(processor, _Gemma3).image_seq_length + 2)
    except msgspec.ValidationError:
        pass  # settings that are not the family's usual ones
    return None


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of a picture whose header has been read before, within all limits."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def _fixed(tokens: int, _width: int, _height: int) -> int:
    return tokens


class _Edges(msgspec.Struct):
    """Least and most pixels of a resized picture, whatever their names say."""

    shortest_edge: int
    longest_edge: int


class _QwenVL(msgspec.Struct):
    """Pictures keep their shape: sides become multiples of a merged patch, within bounds on the area."""

    patch_size: int
    merge_size: int
    size: _Edges | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def tokens(self, width: int, height: int) -> int:
        """One for each merged patch."""
        side = self.patch_size * self.merge_size
        least, most = self._bounds()
        rows, columns = max(1, round(height / side)), max(1, round(width / side))
        area = width * height
        if rows * columns * side**2 > most:
            scale = math.sqrt(area / most)
            rows, columns = (max(1, math.floor(length / scale / side)) for length in (height, width))
        elif rows * columns * side**2 < least:
            scale = math.sqrt(least / area)
            rows, columns = (math.ceil(length * scale / side) for length in (height, width))
        return rows * columns

    def _bounds(self) -> tuple[int, int]:
        size = self.size or _Edges(56 * 56, 28 * 28 * 1280)
        return self.min_pixels or size.shortest_edge, self.max_pixels or size.longest_edge


class _Llava(msgspec.Struct):
    """Every picture is cut to one size."""

    patch_size: int
    crop_size: dict[str, Any]
    num_additional_image_tokens: int = 0
    vision_feature_select_strategy: str = "default"

    @property
    def tokens(self) -> int:
        """One for each patch, and for the tower's class token where that is used."""
        patches = (self.crop_size["height"] // self.patch_size) * (self.crop_size["width"] // self.patch_size)
        dropped = 1 if self.vision_feature_select_strategy == "default" else 0
        return int(patches + self.num_additional_image_tokens - dropped)


class _Gemma3(msgspec.Struct):
    image_seq_length: int
