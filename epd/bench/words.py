"""Made-up words: text that is new for each seed and that no server can have in a cache."""

from __future__ import annotations

import random

# fmt: off
_ONSETS = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m",
    "n", "p", "pl", "qu", "r", "s", "sh", "sl", "st", "t", "th", "tr", "v", "w", "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ie", "oo", "ou")
_CODAS = ("", "", "", "b", "ck", "d", "l", "ll", "m", "n", "nd", "ng", "p", "r", "rt", "s", "st", "t", "x")
# fmt: on


def make_word(rng: random.Random, syllables: int = 1) -> str:
    """A word of so many syllables."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def make_text(rng: random.Random, count: int) -> str:
    """So many words of one syllable, separated by spaces. Most tokenizers take one or two tokens for each."""
    return " ".join(make_word(rng) for _ in range(count))
