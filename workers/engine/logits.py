"""What requests do to logits before temperature: masks, biases, penalties, in this order.

1. Grammar, `allowed_token_ids`, `bad_words` and ends before `min_tokens`: other tokens get minus infinity.
2. `logit_bias` is added.
3. Repetition penalty, over prompt and answer: positive logits are divided by it, negative ones multiplied.
4. Frequency and presence penalty, over the answer, are subtracted.

All rows of a batch are done together, and only the entries that change are touched; rows without a state are not.
A row in which every token is masked stays so: `sampler` reports it instead of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.grammar import Bits, GrammarCompiler
from workers.engine.logits_state import Ids, LogitsState
from workers.engine.transfer import to_device

Numbered = Sequence[tuple[int, LogitsState]]
"""Row of the batch and its state."""


def process(logits: torch.Tensor, states: Numbered, grammars: GrammarCompiler | None) -> None:
    """Change `logits` in place.

    Args:
        logits: float32 [rows, vocabulary], contiguous.
        states: of those rows that have one, at least one.
        grammars: made the matchers; may be None when no row has one.
    """
    flat = logits.view(-1)
    with_grammar = [(row, state) for row, state in states if state.matcher is not None]
    if with_grammar:
        assert grammars is not None
        _mask_by_grammar(logits, with_grammar, grammars)
    _keep_allowed(logits, [(row, state) for row, state in states if state.allowed.size])
    banned = _flat_ids(logits, states, LogitsState.banned)
    if banned.size:
        flat.index_fill_(0, _there(banned, logits), -torch.inf)
    biased = [(row, state) for row, state in states if state.bias_ids.size]
    if biased:
        bias = torch.from_numpy(np.concatenate([state.bias_values for _, state in biased])).to(logits.device)
        flat.index_add_(0, _there(_flat_ids(logits, biased, lambda state: state.bias_ids), logits), bias)
    penalised = [(row, state) for row, state in states if state.counts is not None and state.counts.ids.size]
    if penalised:
        _penalise(logits, penalised)


def _mask_by_grammar(logits: torch.Tensor, states: Numbered, grammars: GrammarCompiler) -> None:
    matchers = [state.matcher for _, state in states if state.matcher is not None]
    bits = grammars.masks(matchers, [state.ending for _, state in states])  # those too early are banned below
    upper = _upper_bounds(bits, logits.shape[1], logits.device)
    if len(states) == len(logits):
        torch.minimum(logits, upper, out=logits)
        return
    rows = _there(np.array([row for row, _ in states], dtype=np.int64), logits)
    logits.index_copy_(0, rows, torch.minimum(logits.index_select(0, rows), upper))


def _upper_bounds(bits: Bits, vocab_size: int, device: torch.device) -> torch.Tensor:
    """What logits may be at most: infinity where a bit is set, else minus infinity; [rows, vocab_size].

    The bits travel packed; eight at a time are looked up. Minima are several times faster than filling by a mask.
    """
    packed = torch.from_numpy(bits.view(np.uint8)).to(device)
    found = _byte_bounds(device).index_select(0, packed.view(-1).int())
    return found.view(len(bits), -1)[:, :vocab_size]


@lru_cache
def _byte_bounds(device: torch.device) -> torch.Tensor:
    """Row b is for the eight bits of byte b, the lowest first: float32 [256, 8]."""
    of_bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(of_bits, np.float32(np.inf), np.float32(-np.inf))).to(device)


def _keep_allowed(logits: torch.Tensor, states: Numbered) -> None:
    if not states:
        return
    flat = logits.view(-1)
    allowed = _there(_flat_ids(logits, states, lambda state: state.allowed), logits)
    kept = flat[allowed]
    logits.index_fill_(0, _there(np.array([row for row, _ in states], dtype=np.int64), logits), -torch.inf)
    flat[allowed] = kept


def _penalise(logits: torch.Tensor, states: Numbered) -> None:
    counted = [(row, state, state.counts) for row, state in states if state.counts is not None]
    sizes = [len(counts.ids) for _, _, counts in counted]

    def spread(values: Sequence[float]) -> NDArray[np.float32]:
        return np.repeat(np.array(values, dtype=np.float32), sizes)

    generated = np.concatenate([counts.counts for _, _, counts in counted])
    repetition = spread([state.params.repetition_penalty for _, state, _ in counted])
    subtracted = spread([state.params.frequency_penalty for _, state, _ in counted]) * generated
    subtracted += spread([state.params.presence_penalty for _, state, _ in counted]) * (generated > 0)
    changes = torch.from_numpy(np.stack([repetition, subtracted])).to(logits.device)

    flat = logits.view(-1)
    index = _there(np.concatenate([counts.ids + row * logits.shape[1] for row, _, counts in counted]), logits)
    scores = flat[index]
    scores = torch.where(scores > 0, scores / changes[0], scores * changes[0]) - changes[1]
    flat[index] = scores


def _flat_ids(logits: torch.Tensor, states: Numbered, ids_of: Callable[[LogitsState], Ids]) -> Ids:
    """Indices into the flattened logits of the tokens that `ids_of` gives for each row."""
    return np.concatenate([ids_of(state) + row * logits.shape[1] for row, state in states])


def _there(values: Ids, logits: torch.Tensor) -> torch.Tensor:
    (moved,) = to_device([torch.from_numpy(values)], logits.device)
    return moved
