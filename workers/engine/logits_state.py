"""What one request's penalties, biases, masks and grammar must remember. Integers only: `logits` applies it.

Kept with the request, advanced by each accepted token, and untouched by preemption, which loses no token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from epd.types import SamplingParams
from workers.engine.grammar import GrammarMatcher

Ids = NDArray[np.int64]
"""Token ids, each at most once, inside the vocabulary."""
_NONE: Ids = np.empty(0, dtype=np.int64)


def is_needed(params: SamplingParams) -> bool:
    """Whether a request changes logits before temperature: the others have no state, and cost nothing."""
    return bool(
        params.min_tokens
        or params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1
        or params.logit_bias
        or params.bad_words
        or params.allowed_token_ids
        or params.grammar is not None
    )


class LogitsState:
    """State of one request.

    Args:
        params: of the request.
        token_ids: its expanded prompt, to which the caller appends what is generated. Shared, not copied.
        num_prompt_tokens: how many of them are the prompt; the answer may have begun already.
        ending: tokens that end the answer.
        vocab_size: tokens outside are dropped from all lists.
        matcher: at the start of the request's grammar, if it has one.
    """

    def __init__(
        self,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        *,
        ending: Iterable[int],
        vocab_size: int,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.ending: Ids = _ids(ending, vocab_size)
        self.allowed: Ids = _NONE
        """With those that end the answer; empty: all."""
        if params.allowed_token_ids:
            self.allowed = _ids([*params.allowed_token_ids, *self.ending.tolist()], vocab_size)
        biases = {token: bias for token, bias in params.logit_bias if 0 <= token < vocab_size}
        self.bias_ids: Ids = np.fromiter(biases.keys(), dtype=np.int64, count=len(biases))
        self.bias_values = np.fromiter(biases.values(), dtype=np.float32, count=len(biases))
        self.counts: TokenCounts | None = None
        if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1:
            self.counts = TokenCounts(token_ids[:num_prompt_tokens] if params.repetition_penalty != 1 else ())
        self._bad_words = _BadWords(params.bad_words, vocab_size)
        self._token_ids = token_ids
        self._start = self._seen = num_prompt_tokens
        self.advance()

    def advance(self) -> None:
        """Take in the tokens that were generated since the last call. Those that end the answer are none of it."""
        for token in self._token_ids[self._seen :]:
            if self.counts is not None:
                self.counts.add(token)
            if self.matcher is not None and token not in self.ending:
                self.matcher.accept(token)
        self._seen = len(self._token_ids)

    @property
    def may_end(self) -> bool:
        """Whether `min_tokens` allows the answer to end now."""
        return self._seen - self._start >= self.params.min_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the grammar lets nothing follow but the end."""
        return self.matcher is not None and self.matcher.is_complete

    def banned(self) -> Ids:
        """Tokens that must not come now: last ones of bad words, and ends that would be too early."""
        words = self._bad_words.after(self._token_ids, self._start)
        if self.may_end or not self.ending.size:
            return words
        return np.concatenate([words, self.ending])


class TokenCounts:
    """How often the answer has each of its tokens, and which tokens only the prompt has.

    Args:
        prompt: tokens that count as there, though not as generated.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        unique = np.unique(np.asarray(prompt, dtype=np.int64))
        self._slots = {token: slot for slot, token in enumerate(unique.tolist())}
        self._ids = np.concatenate([unique, np.empty(64, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    @property
    def ids(self) -> Ids:
        """Tokens that are there. Valid until the next `add`."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` was generated."""
        return self._counts[: len(self._slots)]

    def add(self, token: int) -> None:
        """Count a generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1


class _BadWords:
    """Looks up by the last token of the answer which words are about to be completed."""

    def __init__(self, words: Sequence[tuple[int, ...]], vocab_size: int) -> None:
        words = [word for word in words if word and all(0 <= token < vocab_size for token in word)]
        self._single = _ids((word[0] for word in words if len(word) == 1), vocab_size)
        self._by_last_before: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        for word in words:
            if len(word) > 1:
                self._by_last_before[word[-2]].append(word)

    def after(self, token_ids: Sequence[int], start: int) -> Ids:
        """Tokens that would complete a word of the answer, which is `token_ids[start:]`."""
        if not self._by_last_before or len(token_ids) == start:
            return self._single
        completing = {
            word[-1]
            for word in self._by_last_before.get(token_ids[-1], ())
            if len(token_ids) - start >= len(word) - 1 and tuple(token_ids[1 - len(word) :]) == word[:-1]
        }
        return np.concatenate([self._single, np.fromiter(completing, dtype=np.int64, count=len(completing))])


def _ids(tokens: Iterable[int], vocab_size: int) -> Ids:
    return np.unique(np.fromiter((token for token in tokens if 0 <= token < vocab_size), dtype=np.int64))
