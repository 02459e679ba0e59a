"""Log probabilities in the three shapes of the dialect: of chats, of text completions, and of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from epd.types import TokenLogprobs
from proxy.api.openai.objects import (
    ChatLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
)
from proxy.text.answer import ShownToken
from proxy.text.byte_level import REPLACEMENT
from proxy.text.token_text import TokenTexts
from proxy.text.tokenizer import Detokenizer, Tokenizer

VERY_UNLIKELY = -9999.0
"""Stands for minus infinity, which JSON has no number for."""


class TokenNames(Protocol):
    """What tokens are called."""

    def raw(self, token_id: int) -> bytes:
        """The token's bytes."""

    def text(self, token_id: int) -> str:
        """What stands for the token."""


@dataclass(frozen=True)
class TokensAsIds:
    """Tokens called by their ids: different tokens may have the same text, or none that JSON can hold."""

    texts: TokenTexts

    def raw(self, token_id: int) -> bytes:
        """The token's bytes."""
        return self.texts.raw(token_id)

    def text(self, token_id: int) -> str:
        """Its id, as vLLM writes it."""
        return f"token_id:{token_id}"


def chat_logprobs(tokens: Sequence[ShownToken], texts: TokenNames, top: int) -> ChatLogprobs:
    """`choices[].logprobs` of a chat, with the `top` most likely tokens at each position."""
    return ChatLogprobs([_chat_token(token.logprobs, texts, top) for token in tokens])


def _chat_token(known: TokenLogprobs, texts: TokenNames, top: int) -> TokenLogprob:
    best = [
        TopLogprob(texts.text(token), _finite(logprob), list(texts.raw(token))) for token, logprob in known.top[:top]
    ]
    token = known.token_id
    return TokenLogprob(texts.text(token), _finite(known.logprob), list(texts.raw(token)), best)


def text_logprobs(tokens: Sequence[ShownToken], texts: TokenNames, top: int, begins_at: int = 0) -> TextLogprobs:
    """`choices[].logprobs` of a text completion. The token itself is always among those of `top_logprobs`.

    Args:
        tokens: of the answer.
        texts: of the vocabulary.
        top: most likely tokens at each position.
        begins_at: where the answer begins in the text of the choice.
    """
    return TextLogprobs(
        text_offset=[begins_at + token.offset for token in tokens],
        token_logprobs=[_finite(token.logprobs.logprob) for token in tokens],
        tokens=[_key(token.logprobs.token_id, texts) for token in tokens],
        top_logprobs=[_top_of_text(token.logprobs, texts, top) for token in tokens],
    )


def _top_of_text(known: TokenLogprobs, texts: TokenNames, top: int) -> dict[str, float]:
    """Different tokens may have the same text; the likelier one, which comes first, stands for it."""
    found: dict[str, float] = {}
    for token, logprob in (*known.top[:top], (known.token_id, known.logprob)):
        found.setdefault(_key(token, texts), _finite(logprob))
    return found


def _key(token_id: int, texts: TokenNames) -> str:
    """A token's text; bytes that are no whole character are spelt out, as all of them look the same as text."""
    text, raw = texts.text(token_id), texts.raw(token_id)
    is_whole = REPLACEMENT not in text or text.encode() == raw
    return text if is_whole else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_logprobs(positions: Sequence[TokenLogprobs | None], texts: TokenTexts, top: int) -> PromptLogprobs:
    """`prompt_logprobs`, in the shape of vLLM."""
    return [None if known is None else _prompt_position(known, texts, top) for known in positions]


def _prompt_position(known: TokenLogprobs, texts: TokenTexts, top: int) -> dict[str, PromptLogprob]:
    ranked = [(known.token_id, known.logprob, known.rank)]
    ranked += [(token, logprob, rank) for rank, (token, logprob) in enumerate(known.top[:top], 1)]
    found: dict[str, PromptLogprob] = {}
    for token, logprob, rank in ranked:
        found.setdefault(str(token), PromptLogprob(_finite(logprob), rank, texts.text(token)))
    return found


@dataclass(frozen=True)
class Echo:
    """A prompt that is given back before the answer."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int] = ()
    """Where each token's text begins in `text`, when log probabilities are to be told."""

    @classmethod
    def of(cls, token_ids: Sequence[int], tokenizer: Tokenizer, *, with_offsets: bool) -> Echo:
        """Make the text of a prompt."""
        text = tokenizer.decode(token_ids)
        if not with_offsets:
            return cls(text, token_ids)
        detokenizer, offsets, length = Detokenizer(tokenizer), [], 0
        for token_id in token_ids:
            offsets.append(length)
            length += len(detokenizer.push((token_id,)))
        return cls(text, token_ids, offsets)

    def logprobs(self, positions: Sequence[TokenLogprobs | None], texts: TokenNames, top: int) -> TextLogprobs:
        """Of the prompt's tokens; the first one has none."""
        known = list(zip(self.token_ids, positions, strict=True))
        return TextLogprobs(
            text_offset=list(self.offsets),
            token_logprobs=[None if one is None else _finite(one.logprob) for _, one in known],
            tokens=[_key(token, texts) for token, _ in known],
            top_logprobs=[None if one is None else _top_of_text(one, texts, top) for _, one in known],
        )


def joined(first: TextLogprobs, second: TextLogprobs) -> TextLogprobs:
    """The entries of both."""
    return TextLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def _finite(logprob: float) -> float:
    """Neither infinities nor NaN, which would leave a hole in JSON."""
    return logprob if VERY_UNLIKELY < logprob < math.inf else VERY_UNLIKELY
