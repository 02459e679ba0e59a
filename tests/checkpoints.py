"""Tiny random checkpoints, complete and made offline, for tests.

Each `build_*` writes a folder that transformers loads by itself: config, generation config, weights, tokenizer, chat
template and, for the multimodal ones, image processor settings. Weights are drawn with a large spread, so that greedy
answers vary and depend on the picture; end-of-sequence tokens have zero logits, so that an answer never ends by
itself before `max_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

CONTEXT = 2048
"""`max_position_embeddings` of all checkpoints."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED_TOKENS = ("<tool_call>", "</tool_call>")
"""In the vocabulary as a whole, but text to a decoder that skips special tokens."""

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' or tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content if messages[0].content is string else \
messages[0].content[0].text }}{% else %}You are a helpful assistant.{% endif %}
{%- if tools %}

# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if not (loop.first and tools and message.role == 'system') %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% elif message.content %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ (call.function or call) | tojson }}</tool_call>{% endfor -%}
<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "what is in this picture? describe the image in one word",
    "user assistant system you are a helpful assistant",
    "red green blue circle square triangle left right above below one two three",
)


def build_qwen2_5_vl(folder: Path, *, seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """Write a Qwen2.5-VL checkpoint (window attention in the vision tower, M-RoPE) to `folder`."""
    tokenizer = _write_tokenizer(folder)
    config = Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=_MROPE),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        **_multimodal_ids(tokenizer, tie_word_embeddings),
    )
    _write_image_processor(folder, "Qwen2_5_VLProcessor")
    return _write_model(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed)


def build_qwen2_vl(folder: Path, *, seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """Write a Qwen2-VL checkpoint (M-RoPE) to `folder`."""
    tokenizer = _write_tokenizer(folder)
    config = Qwen2VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=_MROPE),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
            "initializer_range": 0.2,
        },
        **_multimodal_ids(tokenizer, tie_word_embeddings),
    )
    _write_image_processor(folder, "Qwen2VLProcessor")
    return _write_model(folder, Qwen2VLForConditionalGeneration, config, tokenizer, seed)


def build_qwen2(folder: Path, *, seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """Write a text-only Qwen2 checkpoint to `folder`."""
    tokenizer = _write_tokenizer(folder)
    config = Qwen2Config(**_text_config(tokenizer), tie_word_embeddings=tie_word_embeddings)
    return _write_model(folder, Qwen2ForCausalLM, config, tokenizer, seed)


_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _text_config(tokenizer: PreTrainedTokenizerFast, **extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        **extra,
    }


def _multimodal_ids(tokenizer: PreTrainedTokenizerFast, tie_word_embeddings: bool) -> dict[str, Any]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in names.items()}
    return {**ids, "tie_word_embeddings": tie_word_embeddings}


def _write_tokenizer(
    folder: Path,
    *,
    more_special_tokens: Sequence[str] = (),
    named_tokens: dict[str, str] | None = None,
    chat_template: str = CHAT_TEMPLATE,
    more_text: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """`named_tokens`: attribute of the tokenizer → one of the special tokens; `more_text`: to learn tokens from."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*_CORPUS, *more_text], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        extra_special_tokens=named_tokens or {},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *more_special_tokens]})
    tokenizer.add_tokens(list(ADDED_TOKENS))
    tokenizer.chat_template = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _write_image_processor(folder: Path, processor_class: str) -> None:
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor_class,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 56 * 56,
        "max_pixels": 64 * 28 * 28,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def _write_model(
    folder: Path, model_class: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
    return _save(folder, model, tokenizer)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    eos = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    with torch.no_grad():
        model.get_output_embeddings().weight[eos] = 0
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)
    return folder
