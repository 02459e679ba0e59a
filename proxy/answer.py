"""Tokens of one sample to the text that a client sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from epd.types import FinishReason
from proxy.tokenizer import Detokenizer, StopChecker, Tokenizer
from proxy.work import Update


@dataclass(frozen=True)
class TextOptions:
    """How text is made of tokens."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    """Stop strings that are complete before so many tokens do not end the answer."""
    skip_special_tokens: bool = True
    with_token_ids: bool = False
    """Whether the client wants the tokens beside the text."""


class Answer:
    """Text of one sample as it grows; the first of model, limit and stop string ends it."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.text = ""
        """All that was given out so far."""
        self.token_ids: list[int] | UnsetType = [] if options.with_token_ids else UNSET
        """All tokens so far, that which ended the answer included."""
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=options.skip_special_tokens)
        self._stops = StopChecker(options.stop)
        self._min_tokens = options.min_tokens

    def push(self, update: Update) -> str:
        """The new text, which may be empty; sets `finish_reason` at the end."""
        if self.finish_reason is not None:
            return ""
        shown = _without_stop_token(update)
        text = self._push_tokens(shown)
        if self._stops.matched is None:
            self._count(update.token_ids[len(shown) :])
            if update.finish_reason is not None:
                text += self._flush()
                self.finish_reason = update.finish_reason
        self.text += text
        if self._stops.matched is not None:
            self.finish_reason = FinishReason.STOP
        return text

    def _push_tokens(self, token_ids: Sequence[int]) -> str:
        """One by one, so that tokens after a stop string are neither shown nor counted."""
        pieces = []
        for token_id in token_ids:
            self._count((token_id,))
            text = self._detokenizer.push((token_id,))
            pieces.append(text if self.completion_tokens < self._min_tokens else self._stops.push(text))
            if self._stops.matched is not None:
                break
        return "".join(pieces)

    def _count(self, token_ids: Sequence[int]) -> None:
        self.completion_tokens += len(token_ids)
        if self.token_ids is not UNSET:
            self.token_ids.extend(token_ids)

    def _flush(self) -> str:
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()


def _without_stop_token(update: Update) -> list[int]:
    if update.stop_token_id is not None and update.token_ids and update.token_ids[-1] == update.stop_token_id:
        return update.token_ids[:-1]
    return update.token_ids
