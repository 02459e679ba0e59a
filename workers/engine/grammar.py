"""Grammars of answers: compiled once, matched token by token, turned into masks over the vocabulary.

The work is llguidance's (see `epd.grammar_check` for why). Ends are ours: a token that ends the answer may come when
the text so far is a whole sentence of the grammar and `min_tokens` are there, and never else; when nothing but the end
can follow, the engine ends the answer without asking the model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import llguidance
import numpy as np
from numpy.typing import NDArray

from epd.errors import InvalidRequest
from epd.grammar_check import explain, limits, llguidance_grammar
from epd.types import Grammar

Bits = NDArray[np.uint32]
"""One bit for each token, the lowest first: [rows, ceil(vocabulary / 32)]."""
_WORD_BITS = 32
_MAX_COMPILED = 128


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.inner = matcher

    def accept(self, token: int) -> None:
        """Go on by a token of the answer. One that does not fit sets `error`."""
        self.inner.consume_token(token)

    @property
    def is_accepting(self) -> bool:
        """Whether the answer so far is a whole one."""
        return bool(self.inner.is_accepting())

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end. True after an error too."""
        return bool(self.inner.is_stopped())

    @property
    def error(self) -> str | None:
        """Why the grammar can't be followed further, for the client; None: it can."""
        return explain(self.inner.get_error()) if self.inner.is_error() else None


class GrammarCompiler:
    """Compiles for one vocabulary. Thread-safe.

    Reading the vocabulary takes up to a second without letting other Python threads run, so make one at start.

    Args:
        tokenizer: the checkpoint's tokenizer.json, byte-level or with byte fallback.
        vocab_size: of the model; tokens beyond the tokenizer's never match.
        eos_token_ids: of the model.
        num_threads: for masks of several rows.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Iterable[int], num_threads: int) -> None:
        try:
            self._tokenizer = llguidance.LLTokenizer(str(tokenizer), n_vocab=vocab_size)
        except ValueError:  # some checkpoints have fewer rows than their tokenizer has tokens
            self._tokenizer = llguidance.LLTokenizer(str(tokenizer))
        self._never = np.array(
            sorted({token for token in (*eos_token_ids, *self._tokenizer.eos_tokens) if 0 <= token < vocab_size}),
            dtype=np.int64,
        )
        """Ends of the model: in no text, and allowed by name only."""
        self._num_words = -(-self._tokenizer.vocab_size // _WORD_BITS)
        self._executor = llguidance.LLExecutor(num_threads)
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> None:
        """Make `matcher` cheap for this grammar. May take a part of a second: not on the engine's thread.

        Raises:
            InvalidRequest: this model's tokens can't follow it.
        """
        self.matcher(grammar)

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the start of `grammar`. Raises as `compile`."""
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return GrammarMatcher(compiled.deep_copy())
        compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
            return GrammarMatcher(compiled.deep_copy())

    def masks(self, matchers: Sequence[GrammarMatcher], ends: Sequence[NDArray[np.int64]]) -> Bits:
        """Which tokens may come next.

        Args:
            matchers: one for each row, all different.
            ends: for each row the tokens that end the answer; they may come where the answer is whole.

        Returns:
            [rows, words]; one bit at least for each token of the model.
        """
        bits = np.zeros((len(matchers), self._num_words), dtype=np.uint32)
        numbered = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(numbered, bits.ctypes.data, self._num_words * 4, len(matchers))
        for row, (matcher, tokens) in enumerate(zip(matchers, ends, strict=True)):
            _clear(bits[row], self._never)
            _clear(bits[row], tokens)
            if matcher.is_accepting:
                np.bitwise_or.at(bits[row], tokens // _WORD_BITS, _bit_of(tokens))
        return bits

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        try:
            source = llguidance_grammar(grammar)
        except ValueError as error:
            raise _unusable(str(error)) from error
        compiled = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=limits())
        if compiled.is_error():
            raise _unusable(compiled.get_error())
        return compiled


def unusable(reason: str) -> InvalidRequest:
    """The error of a request whose grammar turns out not to work."""
    return InvalidRequest(f"The answer's grammar can't be followed: {reason}", param="response_format")


def _unusable(error: str) -> InvalidRequest:
    return unusable(explain(error))


def _clear(bits: Bits, tokens: NDArray[np.int64]) -> None:
    np.bitwise_and.at(bits, tokens // _WORD_BITS, ~_bit_of(tokens))


def _bit_of(tokens: NDArray[np.int64]) -> Bits:
    return np.uint32(1) << (tokens % _WORD_BITS).astype(np.uint32)
