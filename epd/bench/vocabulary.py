"""A tokenizer of Qwen2's kind for random checkpoints: byte-level BPE, learnt offline from made-up words.

Every id below the size of the vocabulary is a token with a text of its own, so that a server streams some text for
each token that a model of random weights answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from epd.bench.words import make_word
from epd.demo import qwen_files

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""In the order, and behind the other tokens, as Qwen2.5-VL has them."""

CHAT_TEMPLATE = (
    """\
{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
"""
    + qwen_files.CHAT_TEMPLATE
)

# Qwen2's split into pieces that no merge crosses.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MAX_LEARNT = 32768
"""Larger vocabularies are filled up with tokens that no merge makes: learning 150,000 merges takes minutes."""
_FILLER = "Ġtoken"
"""Ġ stands for the space in byte-level vocabularies."""
_WORDS = 44_000
_WORDS_PER_LINE = 100


def build_tokenizer(special_offset: int, *, seed: int = 0) -> Tokenizer:
    """Learn a tokenizer whose special tokens begin at id `special_offset`. The same seed gives the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(special_offset, _MAX_LEARNT),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer = _filled(tokenizer, special_offset)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _filled(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """The same tokenizer with `size` tokens; the new ones are decoded but never made from text."""
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"{_FILLER}{index}": index for index in range(len(vocabulary), size)}
    return Tokenizer.from_str(json.dumps(content))


def _corpus(seed: int) -> Iterator[str]:
    """Lines of distinct words, each once with a space before and half of them also at a line's start."""
    rng = random.Random(f"vocabulary:{seed}")
    words = list(
        dict.fromkeys(make_word(rng, rng.choices((1, 2, 3), weights=(1, 5, 4))[0]) for _ in range(2 * _WORDS))
    )[:_WORDS]
    yield "user\nassistant\nsystem\nYou are a helpful assistant."
    for start in range(0, len(words), _WORDS_PER_LINE):
        yield " ".join(words[start : start + _WORDS_PER_LINE])


def special_ids(special_offset: int) -> dict[str, int]:
    """Special token → id."""
    return {token: special_offset + index for index, token in enumerate(SPECIAL_TOKENS)}


def tokenizer_config(context: int, specials: Sequence[str] = SPECIAL_TOKENS) -> dict[str, Any]:
    """tokenizer_config.json, for transformers' own Qwen2 tokenizer."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": context,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": list(specials[1:]),
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "split_special_tokens": False,
        "chat_template": CHAT_TEMPLATE,
    }
