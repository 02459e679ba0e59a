"""The text side of a checkpoint: all that a proxy reads of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from epd.checkpoint import fingerprint, image_placeholder, read_json
from epd.errors import ConfigError
from proxy.media.image_tokens import image_tokens_of
from proxy.text.chat_template import ChatTemplate
from proxy.text.next_turn import NextTurn
from proxy.text.token_text import TokenTexts
from proxy.text.tokenizer import Tokenizer


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What the checkpoint's generation_config.json asks for when a request says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    """Whether it asks for sampling in so many words. Only dialects that are greedy by default look at it."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> SamplingDefaults:
        """Read them; a checkpoint that says `do_sample: false` is greedy by default.

        Raises:
            ConfigError: a value is none.
        """
        if config.get("do_sample") is False:
            config = config | {"temperature": 0.0, "top_p": None, "top_k": None}
        known = {name: config[name] for name in cls.__struct_fields__ if config.get(name) is not None}
        try:
            return msgspec.convert(known, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"generation_config.json: {error}") from error


class Checkpoint:
    """Tokenizer, chat template and settings of one checkpoint. Loading takes up to seconds; nothing changes after.

    Args:
        folder: in Hugging Face format.

    Raises:
        ConfigError: one of its files is wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprint = fingerprint(folder)
        self.tokenizer = Tokenizer(folder / "tokenizer.json")
        self.token_texts = TokenTexts(self.tokenizer.backend)
        self.template = ChatTemplate.from_checkpoint(folder, self.tokenizer)
        self.next_turn = None if self.template is None else NextTurn(self.template, self.tokenizer)
        self.model_config = read_json(folder, "config.json")
        self.pooling_config = read_json(folder, "1_Pooling/config.json")
        self.image = image_placeholder(folder)
        self.image_token_id = None if self.image is None else self.image.token_id
        self.image_tokens = image_tokens_of(folder)
        generation = read_json(folder, "generation_config.json")
        self.sampling_defaults = SamplingDefaults.of(generation)
        self.bos_token_id = _bos_token_id(self.model_config.get("text_config"), self.model_config, generation)
        """The token that a document begins with; None: there is none."""


def _bos_token_id(*configs: Any) -> int | None:
    found = (config.get("bos_token_id") for config in configs if isinstance(config, dict))
    return next((token for token in found if isinstance(token, int)), None)
