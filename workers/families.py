"""The multimodal families that are covered, and all that the encoder and the engine must know to tell them apart.

The rest is transformers' own: the processor class says what a placeholder expands to, the model class computes the
rows that replace the image tokens in it (`get_image_features`), and where those stand (`get_rope_index`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from transformers import PretrainedConfig

from epd.errors import ConfigError
from workers.model_tasks import architecture


class SizeBound(Enum):
    """How a family's image processor is told to make no more of a picture than so many pixels."""

    AREA = auto()
    """Its `size` bounds the area of the resized picture, under names that elsewhere mean the lengths of its sides."""
    TILES = auto()
    """`max_patches` bounds the number of tiles."""
    LONGEST_EDGE = auto()
    """`size` bounds the longer side, before the picture is cut into tiles."""
    SHRINK = auto()
    """It has no such setting, but cuts a smaller picture into fewer tiles."""
    FIXED = auto()
    """Every picture becomes the same size, whatever it is asked."""


@dataclass(frozen=True)
class Family:
    """What differs. Paths are dotted names in the class that `from_pretrained` builds."""

    vision: tuple[str, ...]
    """Submodules and parameters that a prefill-decode worker does without."""
    language: tuple[str, ...]
    """Those that an encoder does without."""
    image_inputs: tuple[str, ...] = ("pixel_values",)
    """What `get_image_features` takes of the image processor's output; each has pictures, tiles or patches first."""
    tile_axis: bool = False
    """Whether it takes pixels as [pictures, tiles, …], where others have [tiles, …]."""
    size_bound: SizeBound = SizeBound.FIXED
    deepstack: bool = False
    """Whether rows of several layers of the vision tower go to as many layers of the language model."""
    bidirectional_images: bool = False
    """Whether the tokens of a picture see those behind them, too."""
    vision_towers: tuple[str, ...] = ()
    """`model_type` of the towers that are covered, for a family that can have any; empty: it has but one."""

    @property
    def has_grid(self) -> bool:
        """Whether positions depend on the picture's grid of patches."""
        return "image_grid_thw" in self.image_inputs


_LANGUAGE = ("model.language_model", "lm_head")
_TOWER = ("model.vision_tower", "model.multi_modal_projector")


def _qwen(*, deepstack: bool = False) -> Family:
    return Family(
        vision=("model.visual",),
        language=_LANGUAGE,
        image_inputs=("pixel_values", "image_grid_thw"),
        size_bound=SizeBound.AREA,
        deepstack=deepstack,
    )


def _idefics() -> Family:
    return Family(
        vision=("model.vision_model", "model.connector"),
        language=("model.text_model", "lm_head"),
        image_inputs=("pixel_values", "pixel_attention_mask"),
        tile_axis=True,
        size_bound=SizeBound.LONGEST_EDGE,
    )


FAMILIES: dict[str, Family] = {
    "gemma3": Family(_TOWER, _LANGUAGE, bidirectional_images=True, vision_towers=("siglip_vision_model",)),
    "idefics3": _idefics(),
    "internvl": Family(_TOWER, _LANGUAGE, size_bound=SizeBound.TILES, vision_towers=("internvl_vision",)),
    "llava": Family(_TOWER, _LANGUAGE, vision_towers=("clip_vision_model", "siglip_vision_model")),
    "llava_onevision": Family(
        _TOWER,  # and not `image_newline`, one vector, which transformers looks for when it fills in weights
        _LANGUAGE,
        image_inputs=("pixel_values", "image_sizes"),
        size_bound=SizeBound.SHRINK,
        vision_towers=("siglip_vision_model",),
    ),
    "qwen2_5_vl": _qwen(),
    "qwen2_vl": _qwen(),
    "qwen3_vl": _qwen(deepstack=True),
    "qwen3_vl_moe": _qwen(deepstack=True),
    "smolvlm": _idefics(),
}
"""`model_type` → what is special about it."""


def family_of(config: PretrainedConfig) -> Family:
    """What is special about a multimodal checkpoint.

    Raises:
        ConfigError: the family is not covered, or not with this vision tower.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"{architecture(config)} (model type {config.model_type}) is not covered. Multimodal model types "
            f"covered: {', '.join(sorted(FAMILIES))}; of text-only ones see the README."
        )
    tower = getattr(config.vision_config, "model_type", None)
    if family.vision_towers and tower not in family.vision_towers:
        raise ConfigError(
            f"{architecture(config)} with a vision tower of type {tower} is not covered; "
            f"{' and '.join(family.vision_towers)} are."
        )
    return family
