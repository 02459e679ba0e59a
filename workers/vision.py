"""The vision side of a model: its image processor, its vision tower, and what a placeholder expands to.

Everything is the checkpoint's own: transformers' image processor makes the patches, transformers' model class runs
the tower, and the processor class says which tokens stand for a picture (`workers.image_inputs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from epd.checkpoint import image_placeholder
from epd.errors import ConfigError, InternalError
from workers import quantization, tower_cpu
from workers.core_turns import CoreTurns
from workers.embedding_cache import EncodedImage
from workers.engine.transfer import large_to_device
from workers.families import Family, family_of
from workers.image_inputs import ImageInputs, load_processor
from workers.model_parts import load_vision_part


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A picture as the vision tower takes it."""

    inputs: dict[str, torch.Tensor]
    """Arguments of `get_image_features`, on the CPU; the first axis counts pictures, tiles or patches."""
    token_ids: tuple[int, ...]
    """What one placeholder expands to."""
    num_patches: int
    """What the tower sees, in its patches."""

    @property
    def grid_thw(self) -> tuple[int, int, int] | None:
        """Patches (time, height, width) before merging, where positions depend on them."""
        if "image_grid_thw" not in self.inputs:
            return None
        time, height, width = self.inputs["image_grid_thw"][0].tolist()
        return time, height, width

    @property
    def nbytes(self) -> int:
        """Memory of the inputs."""
        return sum(tensor.nbytes for tensor in self.inputs.values())


class Tower(Protocol):
    """The part of a transformers model class that an encoder uses."""

    config: Any
    dtype: torch.dtype

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `nn.Module` has it."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """As `nn.Module` has it."""
        ...

    def get_image_features(self, **inputs: torch.Tensor) -> Any:
        """`pooler_output` of what is returned: [rows, hidden size] for each picture or for each tile."""


class VisionModel:
    """Image processor and vision tower of one checkpoint. Make it with `load`.

    `preprocess` may be called from several threads at once; `encode` from one.
    """

    def __init__(self, tower: Tower, family: Family, inputs: ImageInputs, device: torch.device) -> None:
        self._tower = tower
        self._family = family
        self._inputs = inputs
        self._device = device
        self._turns = CoreTurns(None)

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
        family = family_of(tower.config)
        if quantization.is_plain(tower.config, tower.device):
            tower_cpu.speed_up(tower, has_sequences=family.has_grid)
        placeholder = image_placeholder(path)
        border = "" if placeholder is None else placeholder.border
        inputs = ImageInputs(load_processor(path, tower.config.model_type), family, border)
        return cls(tower, family, inputs, torch.device(device))

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
        """Resize, normalise and cut a picture into patches; arguments and errors: see `ImageInputs.make`."""
        inputs, token_ids = self._inputs.make(image, max_pixels)
        return PreparedImage(inputs, token_ids, self._count_patches(inputs["pixel_values"]))

    def _count_patches(self, pixels: torch.Tensor) -> int:
        if pixels.ndim == 2:  # [patches, channels × patch volume]
            return len(pixels)
        patch = self._tower.config.vision_config.patch_size
        down, across = (patch, patch) if isinstance(patch, int) else patch
        return len(pixels) * (pixels.shape[-2] // down) * (pixels.shape[-1] // across)

    def take_turns(self, turns: CoreTurns) -> None:
        """Share the cores with other workers: `encode` takes turns and gives way between layers. Call it once."""
        self._turns = turns
        for layers in self._tower.modules():
            for layer in layers if isinstance(layers, nn.ModuleList) else ():
                for part in (layer, *layer.children()):
                    part.register_forward_pre_hook(lambda *_: turns.give_way())

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[torch.Tensor]:
        """Run the vision tower over all pictures: at once, as far as their inputs have the same form.

        Returns:
            For each picture [rows, hidden size], or [1 + levels, rows, hidden size] with deepstack, on the CPU, with
            storage of its own: a slice would keep the whole batch alive in the cache.

        Raises:
            InternalError: the tower's rows don't match the tokens that they are to replace.
        """
        batches: dict[tuple[torch.Size, ...], list[int]] = {}
        for index, image in enumerate(images):
            batches.setdefault(tuple(tensor.shape[1:] for tensor in image.inputs.values()), []).append(index)
        encoded: dict[int, torch.Tensor] = {}
        with self._turns:
            for indices in batches.values():
                encoded.update(zip(indices, self._encode_batch([images[index] for index in indices]), strict=True))
        return [encoded[index] for index in range(len(images))]

    def _encode_batch(self, images: list[PreparedImage]) -> list[torch.Tensor]:
        names = self._family.image_inputs
        output = self._tower.get_image_features(
            **{
                name: large_to_device(torch.cat([image.inputs[name] for image in images]), self._device)
                for name in names
            }
        )
        levels = [output.pooler_output, *(output.deepstack_features if self._family.deepstack else ())]
        parts = list(zip(*levels, strict=True))  # one for each picture or tile, of all levels
        counts = [1 if len(parts) == len(images) else len(image.inputs["pixel_values"]) for image in images]
        if sum(counts) != len(parts):
            raise InternalError(f"The vision tower made features of {len(parts)} pictures for {len(images)}.")
        rows, first = [], 0
        for image, count in zip(images, counts, strict=True):
            own = [torch.cat(level) for level in zip(*parts[first : first + count], strict=True)]
            first += count
            rows.append((torch.stack(own) if self._family.deepstack else own[0]).cpu())
            self._check(image, rows[-1])
        return rows

    def _check(self, image: PreparedImage, rows: torch.Tensor) -> None:
        wanted = image.token_ids.count(self._tower.config.image_token_id)
        if rows.shape[-2] != wanted or rows.ndim != 2 + self._family.deepstack:
            raise InternalError(f"The vision tower made {rows.shape[-2]} rows for {wanted} image tokens.")

    def encode_for_wire(self, images: list[PreparedImage]) -> list[EncodedImage]:
        """As `encode`, in the form that travels."""
        return [to_encoded_image(image, rows) for image, rows in zip(images, self.encode(images), strict=True)]

    def warm_up(self) -> None:
        """Encode a small picture, so that the first request does not pay for lazy set-up.

        Raises:
            ConfigError: the checkpoint makes features that can't be shipped.
        """
        try:
            self.encode([self.preprocess(Image.new("RGB", (64, 64), "white"))])
        except InternalError as error:
            raise ConfigError(f"processor and weights of the checkpoint don't fit together: {error}") from error


def to_encoded_image(prepared: PreparedImage, rows: torch.Tensor) -> EncodedImage:
    """The wire form of a picture's embeddings; shares the memory of `rows`, which is contiguous and on the CPU."""
    # numpy has no bfloat16, bytes it has.
    data = rows.view(torch.uint8).reshape(-1).numpy().data
    dtype = str(rows.dtype).removeprefix("torch.")
    return EncodedImage(prepared.token_ids, prepared.grid_thw, tuple(rows.shape), dtype, data)


def pick_device(name: str) -> str:
    """What `auto` means here; other names stay as they are."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
