"""`epd bench checkpoint`: Qwen2.5-VL checkpoints of random weights, complete and made offline.

`small` has weights and runs on a CPU; the sizes of the published models are written without, for
`--load-format dummy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from epd.bench import vocabulary
from epd.bench.sizes import SIZES
from epd.demo.qwen_files import image_processor, write_json
from epd.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """What distinguishes one size from another."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    vocab_size: int
    special_offset: int
    """Id of the first special token."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    has_weights: bool = False
    max_pixels: int = 12845056

    @property
    def ids(self) -> dict[str, int]:
        """Special token → id."""
        return vocabulary.special_ids(self.special_offset)


_PUBLISHED_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_PUBLISHED_TEXT = {
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}

SHAPES: dict[str, Shape] = {
    "small": Shape(
        text={
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision={
            "depth": 8,
            "hidden_size": 512,
            "intermediate_size": 1368,
            "num_heads": 8,
            "fullatt_block_indexes": [3, 7],
            "out_hidden_size": 768,
        },
        vocab_size=32768,
        special_offset=32768 - len(vocabulary.SPECIAL_TOKENS),
        initializer_range=0.04,
        has_weights=True,
    ),
    "qwen2.5-vl-3b": Shape(
        text={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            **_PUBLISHED_TEXT,
        },
        vision={**_PUBLISHED_VISION, "out_hidden_size": 2048},
        vocab_size=151936,
        special_offset=151643,
        tie_word_embeddings=True,
    ),
    "qwen2.5-vl-7b": Shape(
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            **_PUBLISHED_TEXT,
        },
        vision={**_PUBLISHED_VISION, "out_hidden_size": 3584},
        vocab_size=152064,
        special_offset=151643,
    ),
}


def write_checkpoint(size: str, folder: Path, *, seed: int = 0) -> None:
    """Write a checkpoint that transformers, vLLM and epd load: in bfloat16, or without weights.

    The output head's rows of special tokens are zero, so that a greedy answer never ends by itself.

    Args:
        size: one of `epd.bench.sizes.SIZES`.
        folder: made if need be; files of the same names are replaced.
        seed: of weights and vocabulary.

    Raises:
        ConfigError: `size` is unknown, or `folder` can't be written.
    """
    if size not in SHAPES:
        raise ConfigError(f"--size {size}: want one of {', '.join(SIZES)}")
    shape = SHAPES[size]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(shape, folder, seed)
        write_json(folder / "preprocessor_config.json", image_processor(min_pixels=3136, max_pixels=shape.max_pixels))
        if shape.has_weights:
            _save_model(shape, folder, seed)
        else:
            model_config(shape).save_pretrained(folder)
            _generation_config(shape).save_pretrained(folder)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error}") from error


def model_config(shape: Shape) -> Qwen2_5_VLConfig:
    """The config of a size."""
    text = {
        "vocab_size": shape.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "bos_token_id": shape.ids["<|endoftext|>"],
        "eos_token_id": shape.ids["<|im_end|>"],
        "pad_token_id": None,
        "initializer_range": shape.initializer_range,
        "tie_word_embeddings": shape.tie_word_embeddings,
        **shape.text,
    }
    vision = {
        "hidden_act": "silu",
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "initializer_range": shape.initializer_range,
        **shape.vision,
    }
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
        tie_word_embeddings=shape.tie_word_embeddings,
        image_token_id=shape.ids["<|image_pad|>"],
        video_token_id=shape.ids["<|video_pad|>"],
        vision_start_token_id=shape.ids["<|vision_start|>"],
        vision_end_token_id=shape.ids["<|vision_end|>"],
        text_config=text,
        vision_config=vision,
    )


def _save_model(shape: Shape, folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(model_config(shape)).to(torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight[list(shape.ids.values())] = 0
    model.generation_config = _generation_config(shape)
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes it private


def _generation_config(shape: Shape) -> GenerationConfig:
    ids = shape.ids
    return GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )


def _write_tokenizer(shape: Shape, folder: Path, seed: int) -> None:
    vocabulary.build_tokenizer(shape.special_offset, seed=seed).save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", vocabulary.tokenizer_config(shape.text["max_position_embeddings"]))
    (folder / "chat_template.jinja").write_text(vocabulary.CHAT_TEMPLATE, encoding="utf-8")
