"""The short way to tokens gives those of the library, token for token, or is not taken."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from epd.demo import CHECKPOINT_DIR
from proxy.text import ascii_encoder
from proxy.text.ascii_encoder import AsciiEncoder

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
WITH_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+"
)
WITH_GAPS = r"\p{L}+|'|\p{M}|\p{N}{2}"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|im", "  ")
ASCII = (
    *map(chr, range(128)), *SPECIAL, "hello", " world", "World", "THE end", "I'll", "they'RE", "can't", "'Ve", "12345",
    "  \n", "\r\n\r\n", "<|im_", "|>",
)  # fmt: skip
PARTS = (
    *ASCII, "é", "e\u0301", "\u017f", "'\u017f", "\u212a", "日本", "👩\u200d👧", "\u00a0", "\x85", "\u2028", "ß",
)  # fmt: skip


def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), byte_level])


def make(
    pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None, **options: bool
) -> Tokenizer:
    """`options`: of the added tokens."""
    backend, source = Tokenizer(models.BPE()), random.Random(0)
    backend.pre_tokenizer = byte_level(use_regex=False)  # so that there are tokens across all places to cut at
    texts = ["".join(source.choices(ASCII[9:14] + ASCII[32:], k=30)) for _ in range(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    )
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([AddedToken(text, **{"normalized": False, **options}) for text in SPECIAL])
    return backend


def byte_level(**options: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


KNOWN: dict[str, Callable[[], Tokenizer]] = {
    "demo": lambda: Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json")),
    "gpt2": lambda: make(byte_level(), normalized=True),
    "qwen": lambda: make(split(QWEN), normalizers.NFC()),
    "llama3": lambda: make(split(LLAMA3)),
    "with cases": lambda: make(split(WITH_CASES)),
    "with gaps": lambda: make(split(WITH_GAPS)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_tokens_are_those_of_the_library(name: str) -> None:
    backend = KNOWN[name]()
    encoder = AsciiEncoder.of(backend)
    assert encoder is not None
    source = random.Random(name)
    texts = ["", *map("".join, product(map(chr, range(128)), repeat=2))]
    texts += ["".join(source.choices(PARTS, k=source.randrange(1, 40))) for _ in range(4000)]
    texts += ["".join(source.choices(ASCII, k=source.randrange(1, 40))) for _ in range(4000)]
    for _ in range(2):  # anew, and as it is remembered
        for text in texts:
            assert encoder.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    "backend",
    [
        lambda: make(byte_level(add_prefix_space=True)),
        lambda: make(byte_level(use_regex=False)),
        lambda: make(split(QWEN, "removed")),
        lambda: make(split(r"\p{L}+|\p{P}")),
        lambda: make(split(r"(a|b)+")),
        lambda: make(split(r"\w+|^a")),
        lambda: make(split(r"\p{L}{2}{3}|\s+")),
        lambda: make(pre_tokenizers.Sequence([])),
        lambda: make(split(QWEN), normalizers.NFKC()),
        lambda: make(split(QWEN), normalizers.Lowercase()),
        lambda: make(split(QWEN), normalizers.NFC(), normalized=True),
        lambda: make(split(QWEN), lstrip=True),
        lambda: make(split(QWEN), rstrip=True),
        lambda: make(split(QWEN), single_word=True),
        lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
)
def test_not_taken_where_it_might_be_wrong(backend: Callable[[], Tokenizer]) -> None:
    assert AsciiEncoder.of(backend()) is None


def test_not_taken_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, because a library has another meaning of its expressions from now on."""
    monkeypatch.setitem(ascii_encoder._PROPERTIES, "L", "A-Y")
    assert AsciiEncoder.of(make(split(QWEN))) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascii_encoder, "_MOST_KEPT", 10)
    backend = make(split(QWEN))
    encoder = AsciiEncoder.of(backend)
    assert encoder is not None
    remembered: Any = encoder._tokens
    pieces = remembered.__self__
    for text in [*map(str, range(100)), " hello" * 9, "x" * 100]:
        assert encoder.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert len(pieces) <= 10
    assert "x" * 100 not in pieces
