"""From a picture to the arguments of a model's `get_image_features`, by the checkpoint's own processor."""

from __future__ import annotations

import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from epd.checkpoint import read_json
from epd.errors import ConfigError, InvalidImage
from workers.families import Family, SizeBound


class ImageInputs:
    """The processor of one checkpoint. May be called from several threads at once."""

    def __init__(self, processor: Any, family: Family, border: str) -> None:
        """Work with a processor that `load_processor` returned.

        Args:
            processor: of the checkpoint.
            family: of the checkpoint.
            border: `epd.checkpoint.ImagePlaceholder.border`.
        """
        self._border = border
        self._processor = processor
        self._image_processor = processor.image_processor
        self._family = family
        # What the processor class adds to the image processor's own settings.
        self._settings = dict(getattr(processor, "images_kwargs", {}))
        # The tokenizers library raises "Already borrowed" when two threads are inside one tokenizer.
        self._tokenizer_lock = threading.Lock()

    def make(self, image: Image.Image, max_pixels: int | None) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
        """Resize, normalise and cut a picture into patches or tiles.

        Args:
            image: mode RGB.
            max_pixels: upper bound of the resized picture, width × height; None: the checkpoint's own. It has no
                effect on families that make the same size of every picture.

        Returns:
            Arguments of `get_image_features`, on the CPU, and the token ids that one placeholder expands to.

        Raises:
            InvalidImage: the image processor refuses the picture's shape.
        """
        settings = self._settings
        if max_pixels is not None:
            image, bounds = self._bounded(image, max_pixels)
            settings = settings | bounds
        try:
            processed = self._image_processor(images=[image], return_tensors="np", **settings)
        except ValueError as error:
            raise InvalidImage(f"The image processor refuses the picture: {error}") from error
        return self._arguments(processed), self._expand(processed)

    def _arguments(self, processed: Any) -> dict[str, torch.Tensor]:
        has_tile_axis = np.ndim(processed["pixel_values"]) == 5  # [1, tiles, channels, height, width]
        arguments = {}
        for name in self._family.image_inputs:
            tensor = torch.from_numpy(np.asarray(processed[name]))
            if has_tile_axis and name.startswith("pixel_"):
                tensor = tensor.flatten(0, 1)
            arguments[name] = tensor[:, None] if self._family.tile_axis else tensor
        return arguments

    def _expand(self, processed: Any) -> tuple[int, ...]:
        replacement = self._processor.replace_image_token(processed, 0)
        replacement = replacement.removeprefix(self._border).removesuffix(self._border)
        with self._tokenizer_lock:
            return tuple(self._processor.tokenizer.encode(replacement, add_special_tokens=False))

    def _bounded(self, image: Image.Image, max_pixels: int) -> tuple[Image.Image, dict[str, Any]]:
        """The picture, smaller where that is the only way, and settings that bound it."""
        processor = self._image_processor
        match self._family.size_bound:
            case SizeBound.AREA:
                # Both: a bound under the usual minimum would otherwise be exceeded when a small picture is enlarged.
                bounds = {name: min(processor.size[name], max_pixels) for name in ("shortest_edge", "longest_edge")}
                return image, {"size": bounds}
            case SizeBound.TILES:
                tiles = max(1, max_pixels // (processor.size["height"] * processor.size["width"]))
                own = (processor.min_patches, processor.max_patches)
                return image, {"min_patches": min(own[0], tiles), "max_patches": min(own[1], tiles)}
            case SizeBound.LONGEST_EDGE:
                tile = processor.max_image_size["longest_edge"]
                longest = max(tile, math.isqrt(max_pixels) // tile * tile)
                return image, {"size": {"longest_edge": min(longest, processor.size["longest_edge"])}}
            case SizeBound.SHRINK:
                return _shrunk(image, max_pixels), {}
            case SizeBound.FIXED:
                return image, {}


def _shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale >= 1:
        return image
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.BICUBIC)


def load_processor(path: Path, model_type: str) -> Any:
    """The checkpoint's processor class around its image processor and tokenizer, without a video processor.

    `AutoProcessor` would need further packages, for videos only, so the class is built past its checks.

    Raises:
        ConfigError: files are missing or unreadable, or settings are not covered.
    """
    try:
        image_processor: Any = AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no readable image processor or tokenizer: {error}") from error
    original = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
    module = sys.modules[original.__module__]
    if getattr(module, "num2words", original) is None:
        module.num2words = _no_videos  # type: ignore[attr-defined]
    parts: dict[str, Any] = {"image_processor": image_processor, "tokenizer": tokenizer}
    if "video_processor" in original.get_attributes():
        parts["video_processor"] = None
    unchecked: Any = type(original.__name__, (original,), {"check_argument_for_proper_class": lambda *_: None})
    try:
        return unchecked.from_args_and_dict([], read_json(path, "processor_config.json"), **parts)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {original.__name__} does not take this checkpoint's settings: {error}") from error


def _no_videos(number: int) -> str:
    raise NotImplementedError("videos are not covered")
