"""Tiny random checkpoints of text-only families; see `tests.checkpoints` for what all of them have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    InternLM3Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
)

from tests.checkpoints import _save, _text_config, _write_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that its three ranges of wavelengths all occur among the few that a tiny head has.
    "original_max_position_embeddings": 64,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


@dataclass(frozen=True)
class Family:
    """How to build one: classes of transformers, and what differs from the common shape."""

    config: Callable[..., Any]
    model: type[PreTrainedModel]
    settings: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "qwen2": Family(Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_5": Family(Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "llama3": Family(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama3_tied": Family(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": Family(MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 32}),
    "mistral_window": Family(MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "internlm3": Family(
        InternLM3Config,
        LlamaForCausalLM,
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50000.0, "factor": 6.0},
            "qkv_bias": True,
            "bias": True,
            "head_dim": 16,
        },
    ),
    "qwen3_moe": Family(Qwen3MoeConfig, Qwen3MoeForCausalLM, {"head_dim": 16, **MOE}),
}

REWARD_CLASSES = {
    "qwen2": Qwen2ForSequenceClassification,
    "llama3": LlamaForSequenceClassification,
    "qwen3_moe": Qwen3MoeForSequenceClassification,
}
BASE_CLASSES = {"qwen3": Qwen3Model, "mistral_window": MistralModel}


def build(folder: Path, name: str, *, seed: int = 0, **settings: Any) -> Path:
    """Write a checkpoint of the family `name` to `folder`, with `settings` of its config on top."""
    family = FAMILIES[name]
    tokenizer = _write_tokenizer(folder)
    config = family.config(**(_text_config(tokenizer) | {"tie_word_embeddings": False} | family.settings | settings))
    _save(folder, _draw(family.model, config, seed), tokenizer)
    if name == "internlm3":
        _ship_remote_code(folder)
    return folder


def build_reward(folder: Path, name: str, *, seed: int = 0, num_labels: int = 1) -> Path:
    """Write a reward model of the family `name`: a score head in place of the vocabulary's."""
    family, tokenizer = FAMILIES[name], _write_tokenizer(folder)
    model_class = REWARD_CLASSES[name]
    # One that a text may end with: the reference takes padding for no part of the text.
    padding = {"pad_token_id": None}
    config = family.config(**(_text_config(tokenizer) | family.settings | padding), num_labels=num_labels)
    _draw(model_class, config, seed).save_pretrained(folder)
    return folder


def build_embedding(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write the model of the family `name` without any head."""
    family, tokenizer = FAMILIES[name], _write_tokenizer(folder)
    config = family.config(**(_text_config(tokenizer) | family.settings))
    _draw(BASE_CLASSES[name], config, seed).save_pretrained(folder)
    return folder


def _draw(model_class: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
        _draw_vectors(model)
    return model


def _draw_vectors(model: PreTrainedModel) -> None:
    """Biases and norms start as zeros and ones: a forgotten one would not show."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.2


def _ship_remote_code(folder: Path) -> None:
    """As the published checkpoints: names of a class that transformers lacks, and Python that must never run."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "architectures": ["InternLM3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_internlm3.InternLM3Config",
            "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM",
        },
    }
    path.write_text(json.dumps(config, indent=2))
    for name in ("configuration_internlm3", "modeling_internlm3"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of a checkpoint was executed')\n")
