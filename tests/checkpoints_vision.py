"""Tiny random checkpoints of vision-language families; see `tests.checkpoints` for what all of them have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.checkpoints import _MROPE, CHAT_TEMPLATE, _multimodal_ids, _save, _text_config, _write_tokenizer

TILE = 56
"""Side of the square that most towers see, 4 x 4 patches of 14."""

LLAVA_TEMPLATE = """\
{% for message in messages %}{{ message.role | upper }}: {# pictures first, as the original does #}
{%- for part in message.content | selectattr('type', 'equalto', 'image') %}<image>
{% endfor %}
{%- for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""

GEMMA_TEMPLATE = """\
{%- for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string %}{{ message.content | trim }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}
{%- endfor %}{% endif %}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def _chat_ml(image: str) -> str:
    return CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)


@dataclass(frozen=True)
class Family:
    """How to build one: classes of transformers, and what differs from the common shape."""

    config: Callable[..., Any]
    model: type[PreTrainedModel]
    text: dict[str, Any]
    vision: dict[str, Any]
    image_processor: dict[str, Any]
    processor: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    """Other settings of the config."""
    token_ids: dict[str, str] = field(default_factory=dict)
    """Settings of the config that are the id of a token."""
    special_tokens: tuple[str, ...] = ()
    named_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str = CHAT_TEMPLATE
    text_sample: tuple[str, ...] = ()
    """What the tokenizer learns from besides."""


_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "patch_size": 14, "image_size": TILE}
_SQUARE = {"height": TILE, "width": TILE}
_LLAMA = {"model_type": "llama"}
_QWEN2 = {"model_type": "qwen2"}
_PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
_SPLITTING = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}}
_SPLIT_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),  # the other ones are text
)


def _qwen3_vl(config: Callable[..., Any], model: type[PreTrainedModel], **text: Any) -> Family:
    return Family(
        config,
        model,
        text={"num_hidden_layers": 3, "head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True}, **text},
        vision={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 32 * 32},
        },
        processor={"processor_class": "Qwen3VLProcessor"},
    )


FAMILIES: dict[str, Family] = {
    "gemma3": Family(
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        text={
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 12,  # less than the 16 tokens of a picture
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "initializer_range": 0.05,  # embeddings are scaled up
            "tie_word_embeddings": False,  # with so few layers a tied head would repeat the last token for ever
        },
        vision={**_SIGLIP, "image_size": 112, "vision_use_head": False},
        image_processor={"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 112, "width": 112}},
        processor={"processor_class": "Gemma3Processor", "image_seq_length": 16},
        more={"mm_tokens_per_image": 16, "tie_word_embeddings": False},
        token_ids={
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        special_tokens=("<start_of_turn>", "<end_of_turn>"),
        named_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        chat_template=GEMMA_TEMPLATE,
        text_sample=("a\n\n\n\nb",) * 9,  # runs of line breaks are one token, as in the original
    ),
    "idefics3": Family(
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        text=_LLAMA,
        vision={**_TOWER, "patch_size": 14, "image_size": TILE},
        image_processor={"image_processor_type": "Idefics3ImageProcessor", **_SPLITTING},
        processor={"processor_class": "Idefics3Processor", "image_seq_len": 4},
        token_ids={"image_token_id": "<image>"},
        special_tokens=_SPLIT_TOKENS,
        chat_template=_chat_ml("<image>"),
    ),
    "internvl": Family(
        InternVLConfig,
        InternVLForConditionalGeneration,
        text=_QWEN2,
        vision={**_TOWER, "patch_size": [14, 14], "image_size": [TILE, TILE]},
        image_processor={
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": _SQUARE,
            "crop_to_patches": True,
            "max_patches": 6,
        },
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 4},
        more={"image_seq_length": 4, "tie_word_embeddings": False},
        token_ids={"image_token_id": "<IMG_CONTEXT>"},
        named_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        chat_template=_chat_ml("<IMG_CONTEXT>\n"),
    ),
    "llava": Family(
        LlavaConfig,
        LlavaForConditionalGeneration,
        text=_LLAMA,
        vision={**_TOWER, "model_type": "clip_vision_model", "patch_size": 14, "image_size": TILE},
        image_processor={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": TILE},
            "crop_size": _SQUARE,
        },
        processor={
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        token_ids={"image_token_index": "<image>"},
        special_tokens=("<image>",),
        chat_template=LLAVA_TEMPLATE,
    ),
    "llava_onevision": Family(
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        text=_QWEN2,
        vision={**_SIGLIP, "vision_use_head": False},
        image_processor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": _SQUARE,
            "image_grid_pinpoints": _PINPOINTS,
        },
        processor={
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        },
        more={"image_grid_pinpoints": _PINPOINTS, "vision_aspect_ratio": "anyres_max_4"},
        token_ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        special_tokens=("<image>", "<video>"),
        chat_template=_chat_ml("<image>\n"),
    ),
    "qwen3_vl": _qwen3_vl(Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": _qwen3_vl(
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "smolvlm": Family(
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        text=_LLAMA,
        vision={**_TOWER, "patch_size": 14, "image_size": TILE},
        image_processor={"image_processor_type": "SmolVLMImageProcessor", **_SPLITTING},
        processor={"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        token_ids={"image_token_id": "<image>"},
        special_tokens=_SPLIT_TOKENS,
        chat_template=_chat_ml("<image>"),
    ),
}


def build(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint of the family to `folder`."""
    family = FAMILIES[name]
    tokenizer = _write_tokenizer(
        folder,
        more_special_tokens=family.special_tokens,
        named_tokens=family.named_tokens,
        chat_template=family.chat_template,
        more_text=family.text_sample,
    )
    ids = {setting: tokenizer.convert_tokens_to_ids(token) for setting, token in family.token_ids.items()}
    config = family.config(
        text_config=_text_config(tokenizer, **family.text),
        vision_config=dict(family.vision),
        **(ids or _multimodal_ids(tokenizer, False)),
        **family.more,
    )
    (folder / "preprocessor_config.json").write_text(json.dumps({**family.image_processor, **family.processor}))
    (folder / "processor_config.json").write_text(json.dumps(family.processor))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.model(config).to(torch.float32)
        _widen(model)
    return _save(folder, model, tokenizer)


def _widen(model: PreTrainedModel) -> None:
    """Draw the vision side again, with a spread that makes pictures matter; families begin with very small weights."""
    for name, parameter in model.named_parameters():
        is_language = "language_model" in name or "text_model" in name or "lm_head" in name
        if not is_language and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
