"""The demo model's tokenizer and chat format: a small byte-level BPE in the manner of Qwen."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from epd.demo.pictures import draw_picture
from epd.demo.questions import Turn, ask_picture, ask_two
from epd.demo.qwen_files import CHAT_TEMPLATE
from epd.demo.smalltalk import chat

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(len(SPECIAL_TOKENS))
VOCAB_SIZE = 1024
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

# A capital that no small letter follows, and every digit, is a piece of its own and so a token of its own: printed
# words are read letter by letter.
_PIECES = r" ?[A-Z]?[a-z]+|[A-Z]|[0-9]| ?[^\sA-Za-z0-9]+|\s+"

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are epd demo.",
    "Answer briefly.",
    "Answer questions about pictures.",
    "You are a helpful assistant. Look at the picture and answer the question.",
)


def corpus(seed: int = 0, samples: int = 6000) -> Iterator[str]:
    """Text that the merges are learnt from: what people ask and what the model answers."""
    rng = random.Random(f"corpus:{seed}")
    roles = "user\nassistant\nsystem\n"
    for _ in range(samples):
        yield roles
        yield rng.choice(SYSTEM_PROMPTS)
        for turn in _any_turns(rng):
            yield turn.question
            yield turn.answer


def _any_turns(rng: random.Random) -> Sequence[Turn]:
    draw = rng.random()
    if draw < 0.4:
        return chat(rng)
    if draw < 0.6:
        kind = rng.choice(("one", "text"))
        return [ask_two(rng, draw_picture(rng, kind, (84, 84)), draw_picture(rng, kind, (84, 84)))]
    return [ask_picture(rng, draw_picture(rng, rng.choice(("one", "pair", "many", "text")), (112, 112)))]


def build_tokenizer(seed: int = 0) -> Tokenizer:
    """Train the byte-level BPE. The same seed gives the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json: enough for AutoTokenizer, with no class of ours."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "errors": "replace",
        "split_special_tokens": False,
        "chat_template": CHAT_TEMPLATE,
    }


class ChatEncoder:
    """Chat pieces as token ids. Text is encoded with specials switched off: it cannot smuggle one in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self.newline = self.text("\n")

    def text(self, text: str) -> list[int]:
        """Ids of plain text."""
        if text not in self._cache:
            pieces = self._tokenizer.encode_special_tokens
            self._tokenizer.encode_special_tokens = True
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
            self._tokenizer.encode_special_tokens = pieces
            if len(self._cache) > 100_000:
                self._cache.clear()
                return self.text(text)
        return self._cache[text]

    def opening(self, role: str) -> list[int]:
        """<|im_start|>role and a line break."""
        return [IM_START, *self.text(role + "\n")]

    def message(self, role: str, text: str) -> list[int]:
        """A whole message of plain text."""
        return [*self.opening(role), *self.text(text), IM_END, *self.newline]
