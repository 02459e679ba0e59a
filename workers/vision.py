"""The vision side of a model: its image processor, its vision tower, and what a placeholder expands to.

Everything is the checkpoint's own: transformers' image processor makes the patches, transformers' model class runs
the tower, and the processor class says which tokens stand for a picture. Covered are the families whose pictures are
a (time, height, width) grid of patches, packed along one axis: the Qwen-VL line.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from epd.errors import ConfigError, InternalError, InvalidImage
from workers.embedding_cache import EncodedImage
from workers.model_parts import load_vision_part


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A picture as the vision tower takes it."""

    pixel_values: torch.Tensor
    """(patches, channels × patch volume), float32, on the CPU."""
    grid_thw: tuple[int, int, int]
    """Patches (time, height, width)."""
    token_ids: tuple[int, ...]
    """What one placeholder expands to."""

    @property
    def num_patches(self) -> int:
        """Rows of `pixel_values`."""
        return int(self.pixel_values.shape[0])

    @property
    def nbytes(self) -> int:
        """Memory of the patches."""
        return self.pixel_values.nbytes


class Tower(Protocol):
    """The part of a transformers model class that an encoder uses."""

    config: Any
    dtype: torch.dtype

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]: ...  # noqa: D102

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
        """`pooler_output` of what is returned: one tensor (rows, hidden size) for each picture."""


class VisionModel:
    """Image processor and vision tower of one checkpoint. Make it with `load`.

    `preprocess` may be called from several threads at once; `encode` from one.
    """

    def __init__(self, tower: Tower, processor: Any, device: torch.device) -> None:
        self._tower = tower
        self._processor = processor
        self._image_processor = processor.image_processor
        self._device = device
        # The tokenizers library raises "Already borrowed" when two threads are inside one tokenizer.
        self._tokenizer_lock = threading.Lock()

    @classmethod
    def load(cls, path: Path, *, dtype: str = "auto", device: str = "cpu", load_format: str = "auto") -> VisionModel:
        """Read the vision part of a checkpoint, and nothing of its language model.

        Args:
            path: checkpoint folder.
            dtype: of the weights and of the embeddings; "auto" for the checkpoint's own.
            device: where the tower runs.
            load_format: "dummy" for random weights without looking for files.

        Raises:
            ConfigError: no vision part, a family that is not covered, or unreadable files.
        """
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        tower = load_vision_part(str(path), wanted, device, load_format=load_format)
        return cls(tower, _load_processor(path, tower.config.model_type), torch.device(device))

    @property
    def dtype(self) -> str:
        """Of the embeddings, such as `bfloat16`."""
        return str(self._tower.dtype).removeprefix("torch.")

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights in memory, by their names in the whole model."""
        return self._tower.named_parameters()

    @property
    def num_parameters(self) -> int:
        """Numbers in memory as weights."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def preprocess(self, image: Image.Image, max_pixels: int | None = None) -> PreparedImage:
        """Resize, normalise and cut a picture into patches.

        Args:
            image: mode RGB.
            max_pixels: upper bound of the resized picture, width × height; None: the checkpoint's own.

        Raises:
            InvalidImage: the image processor refuses the picture's shape.
        """
        try:
            inputs = self._image_processor(images=[image], return_tensors="np", **self._size(max_pixels))
        except ValueError as error:
            raise InvalidImage(f"The image processor refuses the picture: {error}") from error
        time, height, width = (int(n) for n in inputs["image_grid_thw"][0])
        return PreparedImage(
            pixel_values=torch.from_numpy(inputs["pixel_values"]),
            grid_thw=(time, height, width),
            token_ids=self._expand(inputs),
        )

    @torch.inference_mode()
    def encode(self, images: list[PreparedImage]) -> list[torch.Tensor]:
        """Run the vision tower once over all pictures, whatever their sizes.

        Returns:
            For each picture (rows, hidden size) on the CPU, with storage of its own: a slice would keep the whole
            batch alive in the cache.

        Raises:
            InternalError: the tower's rows don't match the tokens that they are to replace.
        """
        pixel_values = torch.cat([image.pixel_values for image in images]).to(self._device)
        grid = torch.tensor([image.grid_thw for image in images], device=self._device)
        rows = self._tower.get_image_features(pixel_values, grid).pooler_output
        for image, own in zip(images, rows, strict=True):
            wanted = image.token_ids.count(self._tower.config.image_token_id)
            if own.shape[0] != wanted:
                raise InternalError(f"The vision tower made {own.shape[0]} rows for {wanted} image tokens.")
        packed = torch.cat(list(rows)).cpu()
        return [own.clone() for own in torch.split(packed, [len(own) for own in rows])]

    def encode_for_wire(self, images: list[PreparedImage]) -> list[EncodedImage]:
        """As `encode`, in the form that travels."""
        return [to_encoded_image(image, rows) for image, rows in zip(images, self.encode(images), strict=True)]

    def warm_up(self) -> None:
        """Encode a small picture, so that the first request does not pay for lazy set-up.

        Raises:
            ConfigError: the checkpoint makes features that can't be shipped.
        """
        prepared = self.preprocess(Image.new("RGB", (64, 64), "white"))
        (rows,) = self.encode([prepared])
        if rows.ndim != 2:
            raise ConfigError(f"the vision tower makes features of shape {tuple(rows.shape)}, want (rows, hidden size)")

    def _size(self, max_pixels: int | None) -> dict[str, Any]:
        """The Qwen processors bound the picture's area, under names that elsewhere mean the lengths of its sides."""
        if max_pixels is None:
            return {}
        size = self._image_processor.size
        # Both: a bound under the usual minimum would otherwise be exceeded when a small picture is enlarged.
        bounds = {name: min(size[name], max_pixels) for name in ("shortest_edge", "longest_edge")}
        return {"size": bounds}

    def _expand(self, inputs: Any) -> tuple[int, ...]:
        replacement = self._processor.replace_image_token(inputs, 0)
        with self._tokenizer_lock:
            return tuple(self._processor.tokenizer.encode(replacement, add_special_tokens=False))


def to_encoded_image(prepared: PreparedImage, rows: torch.Tensor) -> EncodedImage:
    """The wire form of a picture's embeddings; shares the memory of `rows`, which is contiguous and on the CPU."""
    height, width = rows.shape
    # numpy has no bfloat16, bytes it has.
    data = rows.view(torch.uint8).reshape(-1).numpy().data
    dtype = str(rows.dtype).removeprefix("torch.")
    return EncodedImage(prepared.token_ids, prepared.grid_thw, (height, width), dtype, data)


def _load_processor(path: Path, model_type: str) -> Any:
    """The checkpoint's processor class around its image processor and tokenizer, without a video processor.

    `AutoProcessor` would need torchvision, for videos only, so the class is built past its check of argument types.
    """
    try:
        image_processor = AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no readable image processor or tokenizer: {error}") from error
    if not hasattr(image_processor, "merge_size"):
        raise ConfigError(f"{path}: image processor {type(image_processor).__name__} makes no packed patches")
    original = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
    unchecked = type(original.__name__, (original,), {"check_argument_for_proper_class": lambda *_: None})
    return unchecked(image_processor=image_processor, tokenizer=tokenizer, video_processor=None)


def pick_device(name: str) -> str:
    """What `auto` means here; other names stay as they are."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
