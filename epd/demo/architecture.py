"""The demo model's shape, and how it is written as an ordinary Hugging Face checkpoint folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from epd.demo import chat_format as chat
from epd.demo.qwen_files import CHAT_TEMPLATE, MERGE, PATCH, image_processor, write_json

# Larger pictures are scaled down into the trained range, smaller ones up.
MIN_PIXELS = 84 * 84
MAX_PIXELS = 168 * 168


def model_config() -> Qwen2_5_VLConfig:
    """About 5 million parameters; every kind of block that the large models have is present."""
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        tie_word_embeddings=True,
        image_token_id=chat.IMAGE_PAD,
        video_token_id=chat.VIDEO_PAD,
        vision_start_token_id=chat.VISION_START,
        vision_end_token_id=chat.VISION_END,
        vision_config=_vision_config(),
        text_config=_text_config(),
    )


def _vision_config() -> dict[str, Any]:
    return {
        "depth": 5,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_heads": 6,
        "hidden_act": "silu",
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [2, 4],
        "out_hidden_size": 256,
    }


def _text_config() -> dict[str, Any]:
    return {
        "vocab_size": chat.VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": chat.IM_END,
        "pad_token_id": chat.PAD,
    }


def new_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model in float32; the seed decides its weights."""
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(model_config()).float()


def save_checkpoint(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights in bfloat16, tokenizer, template and configs into `folder`, each file replaced at one stroke."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(fresh)
    tensors = {
        _disk_name(name): _to_disk(value) for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)  # safetensors makes it private
    tokenizer.save(str(fresh / "tokenizer.json"), pretty=False)
    write_json(fresh / "tokenizer_config.json", chat.tokenizer_config())
    (fresh / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(fresh / "preprocessor_config.json", image_processor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS))
    write_json(fresh / "generation_config.json", _generation_config())
    folder.mkdir(parents=True, exist_ok=True)
    for path in fresh.iterdir():
        path.replace(folder / path.name)
    fresh.rmdir()


def _disk_name(name: str) -> str:
    """Names as published Qwen2.5-VL checkpoints have them: visual.* and model.*."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def _to_disk(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to(torch.bfloat16).contiguous().clone()


def _generation_config() -> dict[str, Any]:
    return {
        "do_sample": False,
        "eos_token_id": [chat.IM_END, chat.PAD],
        "pad_token_id": chat.PAD,
        "max_new_tokens": 64,
    }
