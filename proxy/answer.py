"""Tokens of one sample to the text that a client sees, and the log probabilities that belong to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from epd.types import FinishReason, TokenLogprobs
from proxy.tokenizer import Detokenizer, StopChecker, Tokenizer
from proxy.work import Update


@dataclass(frozen=True)
class TextOptions:
    """How text is made of tokens."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    """Stop strings that are complete before so many tokens do not end the answer."""
    skip_special_tokens: bool = True
    include_stop: bool = False
    """Show the stop string or token that ended the answer."""
    continues_prompt: bool = False
    """The answer goes on with the prompt's text, as opposed to a turn of its own."""
    with_token_ids: bool = False
    """Whether the client wants the tokens beside the text."""


@dataclass(frozen=True)
class ShownToken:
    """A token of the answer with its log probabilities."""

    offset: int
    """Where its text begins in the answer. Tokens that make one character together share it."""
    logprobs: TokenLogprobs


class _Unshown:
    """Log probabilities of tokens whose text is held back: part of a character, or of what may be a stop string."""

    def __init__(self) -> None:
        self._tokens: deque[ShownToken] = deque()
        self._made = 0
        """Length of the text that tokens made so far, shown or not."""

    def add(self, logprobs: TokenLogprobs, text: str) -> None:
        """A token came, and completed `text`."""
        self._tokens.append(ShownToken(self._made, logprobs))
        self._made += len(text)

    def take(self, shown: int | None) -> list[ShownToken]:
        """Those whose text begins within the first `shown` characters; all of them for None."""
        taken = []
        while self._tokens and (shown is None or self._tokens[0].offset < shown):
            taken.append(self._tokens.popleft())
        return taken


class Answer:
    """Text of one sample as it grows; the first of model, limit and stop string ends it."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions, prompt: Sequence[int] = ()) -> None:
        self.text = ""
        """All that was given out so far."""
        self.token_ids: list[int] | UnsetType = [] if options.with_token_ids else UNSET
        """All tokens so far, that which ended the answer included."""
        self.logprobs: list[ShownToken] = []
        """Tokens of `text`, when log probabilities came with them: none behind a stop string. The token that ended an
        answer is among them if it is shown, or if the answer went on with the prompt's text."""
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self.completion_tokens = 0
        self.total_logprob = 0.0
        """Of all tokens counted, when log probabilities came with them."""
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            context=prompt if options.continues_prompt else (),
        )
        self._stops = StopChecker(options.stop, include=options.include_stop)
        self._options = options
        self._unshown = _Unshown()

    @property
    def mean_logprob(self) -> float:
        """Per token; 0 when there is none."""
        return self.total_logprob / max(self.completion_tokens, 1)

    def push(self, update: Update) -> str:
        """The new text, which may be empty; sets `finish_reason` at the end."""
        if self.finish_reason is not None:
            return ""
        self.prompt_logprobs = self.prompt_logprobs or update.prompt_logprobs
        shown = len(update.token_ids) - self._ends_with_hidden_token(update)
        text = self._push_tokens(update.token_ids[:shown], update.logprobs[:shown])
        if self._stops.matched is None:
            self._count(update.token_ids[shown:], update.logprobs[shown:])
            self._tell_end(update.logprobs[shown:])
            if update.finish_reason is not None:
                text += self._flush()
                self.finish_reason = update.finish_reason
        self.text += text
        if self._stops.matched is not None:
            self.finish_reason = FinishReason.STOP
        is_whole = self.finish_reason is not None and self._stops.matched is None
        self.logprobs += self._unshown.take(None if is_whole else len(self.text))
        return text

    def _push_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> str:
        """One by one, so that tokens after a stop string are neither shown nor counted."""
        pieces = []
        for index, token_id in enumerate(token_ids):
            known = logprobs[index : index + 1]
            self._count((token_id,), known)
            text = self._detokenizer.push((token_id,))
            for one in known:
                self._unshown.add(one, text)
            pieces.append(text if self.completion_tokens < self._options.min_tokens else self._stops.push(text))
            if self._stops.matched is not None:
                break
        return "".join(pieces)

    def _count(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        self.completion_tokens += len(token_ids)
        self.total_logprob += sum(one.logprob for one in logprobs)
        if self.token_ids is not UNSET:
            self.token_ids.extend(token_ids)

    def _tell_end(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Evaluation harnesses score texts with one token behind and drop that one, so it must be there."""
        if self._options.continues_prompt:
            for one in logprobs:
                self._unshown.add(one, "")

    def _flush(self) -> str:
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()

    def _ends_with_hidden_token(self, update: Update) -> bool:
        ended_by = update.stop_token_id
        return ended_by is not None and update.token_ids[-1:] == [ended_by] and not self._options.include_stop
