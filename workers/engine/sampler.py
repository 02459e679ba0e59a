"""The next token of each row, vectorised over the batch.

Noise for token v of a row is a hash of (seed, position, v), so it depends neither on what else is in the batch nor on
what was drawn before: a request gives the same tokens alone, batched, preempted or resumed on another worker. Adding
Gumbel noise to logits and taking the largest draws from their softmax ("Gumbel-max"). Compared with one uniform number
against cumulated probabilities it survives the rounding differences between batches: those move every boundary of a
cumulated distribution, but here only matter when the two best scores nearly tie.

Filters apply in the order temperature, top-k, top-p, min-p; top-p counts the probability that top-k left. Before them
come masks, biases and penalties, for greedy rows too (see `logits`); log probabilities are of the model's own values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from epd.types import SamplingParams, TokenLogprobs
from workers.engine import draw_kernel
from workers.engine.grammar import GrammarCompiler
from workers.engine.greedy import best_on_host, best_tokens
from workers.engine.logits import process
from workers.engine.logits_state import LogitsState
from workers.engine.logprobs import logprobs_of, most_likely
from workers.engine.transfer import HostCopy, to_device

_MASK64 = (1 << 64) - 1
_GREEDY_BELOW = 1e-5
"""Temperatures below this would only overflow."""
_BLOCK_ELEMENTS = 1 << 16
"""On a CPU noise is made in blocks that stay in the cache: fresh memory costs more than the arithmetic."""
_FIRST_CANDIDATES = 256
"""Rows with top-k or top-p look at this many best tokens first; sorting a whole vocabulary is slow."""


NOTHING = -1
"""Instead of a token: every token is masked in this row."""


class SamplingRow(NamedTuple):
    """What one row of logits needs to become a token."""

    params: SamplingParams
    position: int
    """Index that the new token will have in its sequence."""
    state: LogitsState | None = None
    """Of requests that change logits; None: these parameters do not."""


class Sampled(NamedTuple):
    """What one row became."""

    token_id: int
    """Or `NOTHING`."""
    logprobs: TokenLogprobs | None = None
    """When asked for, and there is a token."""


class Draw:
    """One token a row, chosen on the device and on its way to the host."""

    def __init__(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplingRow],
        grammars: GrammarCompiler | None = None,
        *,
        waits: bool = True,
    ) -> None:
        """Queue the work that chooses.

        Args:
            logits: [rows, vocabulary], any float type; modified when a row has a state.
            rows: one per row of `logits`.
            grammars: made the matchers of the states; may be None when there are none.
            waits: rows with top-k or top-p may wait for the device, to see whether the tokens looked at suffice. Else
                `read` sees to that, and chooses anew if need be.
        """
        self._rows = rows
        self._asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        self._raw = logits[self._asking] if self._asking else logits
        self._states = [(index, row.state) for index, row in enumerate(rows) if row.state is not None]
        if self._states:
            logits = logits.float().contiguous()
            process(logits, self._states, grammars)
        self._logits = logits
        guesses: list[torch.Tensor] | None = None if waits else []
        self.tokens = _choose(logits, rows, guesses)
        """int64 [rows], on the device. Rows that `NOTHING` is left for have some token here."""
        self._copy = HostCopy(_to_read(logits, self.tokens, guesses or ()))
        self.was_revised = False
        """Whether `read` found other tokens than `tokens` had before."""

    def read(self) -> list[Sampled]:
        """The tokens, and what else was asked for.

        This is where the host waits for the step. Log probabilities are computed and waited for here too.

        Raises:
            ArithmeticError: the model's values overflowed. Better than to answer nonsense.
        """
        tokens = self._read()
        if not self._asking:
            return [Sampled(token) for token in tokens]
        return _with_logprobs(self._raw, tokens, self._rows, self._asking)

    def _read(self) -> list[int]:
        found: list[list[float]] = self._copy.read().tolist()
        if any(map(any, found[2:])):
            self.was_revised = True
            self.tokens = _choose(self._logits, self._rows, None)
            found = HostCopy(_to_read(self._logits, self.tokens, ())).read().tolist()
        token_ids, values = [int(token) for token in found[0]], found[1]
        if any(map(math.isnan, values)):
            raise _overflowed()
        for index, _ in self._states:
            if values[index] == -math.inf:
                token_ids[index] = NOTHING
        return token_ids


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow], grammars: GrammarCompiler | None = None) -> list[Sampled]:
    """Choose a token for each row, now; arguments and errors as of `Draw`."""
    if logits.is_cpu and all(map(_wants_best, rows)):
        tokens, has_nan = best_on_host(logits)
        if has_nan:
            raise _overflowed()
        return [Sampled(token) for token in tokens.tolist()]
    return Draw(logits, rows, grammars).read()


def _wants_best(row: SamplingRow) -> bool:
    """Whether the best token is all that the row asks for."""
    params = row.params
    return row.state is None and params.temperature < _GREEDY_BELOW and params.logprobs is None


def _overflowed() -> ArithmeticError:
    return ArithmeticError("the model computed NaN; another --dtype may help, such as bfloat16")


def _to_read(logits: torch.Tensor, tokens: torch.Tensor, guesses: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the host looks at, in one copy: float64 [2 or 3, rows], which holds token ids exactly.

    Tokens, their logits (NaN compares as the largest, so looking at the chosen ones finds it), and for `guesses`,
    bools, whether any of them is true.
    """
    parts = [tokens.double(), logits.gather(1, tokens[:, None]).squeeze(1).double()]
    if guesses:
        parts.append(torch.stack(list(guesses)).any().double().expand_as(parts[0]))
    return torch.stack(parts)


def _choose(logits: torch.Tensor, rows: Sequence[SamplingRow], guesses: list[torch.Tensor] | None) -> torch.Tensor:
    """Tokens, int64 [rows]. With a list of `guesses`, does not wait for the device, but adds to it whether a row's
    token may be wrong."""
    random = [index for index, row in enumerate(rows) if row.params.temperature >= _GREEDY_BELOW]
    if not random:
        return best_tokens(logits)
    tokens = best_tokens(logits) if len(random) < len(rows) else logits.new_zeros(len(rows), dtype=torch.int64)
    if draw_kernel.is_available(logits):
        plain = [index for index in random if not _is_filtered(rows[index])]
        if plain:
            tokens[plain] = draw_kernel.draw(logits, [_to_draw(index, rows[index]) for index in plain])
        random = [index for index in random if _is_filtered(rows[index])]
    if random:
        (picked,) = to_device([torch.tensor(random)], logits.device)
        tokens[picked] = _sample_random(logits[picked].float(), [rows[index] for index in random], guesses)
    return tokens


def _is_filtered(row: SamplingRow) -> bool:
    return row.params.top_k > 0 or row.params.top_p < 1


def _to_draw(index: int, row: SamplingRow) -> tuple[int, int, float, float]:
    """What `draw_kernel` takes."""
    least = math.log(row.params.min_p) if row.params.min_p > 0 else -math.inf
    return index, _key(row), row.params.temperature, least


def _with_logprobs(
    raw: torch.Tensor, tokens: Sequence[int], rows: Sequence[SamplingRow], asking: Sequence[int]
) -> list[Sampled]:
    # A row of nothing looks token 0 up, and drops it.
    looked_up = logprobs_of(
        raw, [max(tokens[index], 0) for index in asking], [rows[index].params.logprobs or 0 for index in asking]
    )
    found = dict(zip(asking, looked_up, strict=True))
    return [Sampled(token, found.get(index) if token != NOTHING else None) for index, token in enumerate(tokens)]


def _sample_random(
    logits: torch.Tensor, rows: Sequence[SamplingRow], guesses: list[torch.Tensor] | None
) -> torch.Tensor:
    logits = logits / _column([row.params.temperature for row in rows], logits)
    filtered = [index for index, row in enumerate(rows) if _is_filtered(row)]
    if not filtered:
        return _draw(_apply_min_p(logits, rows), None, rows)
    if len(filtered) == len(rows):
        return _sample_filtered(logits, rows, guesses)
    tokens = logits.new_zeros(len(rows), dtype=torch.int64)
    for part in (filtered, [index for index in range(len(rows)) if index not in set(filtered)]):
        part_rows = [rows[index] for index in part]
        (picked,) = to_device([torch.tensor(part)], logits.device)
        if part is filtered:
            tokens[picked] = _sample_filtered(logits[picked], part_rows, guesses)
        else:
            tokens[picked] = _draw(_apply_min_p(logits[picked], part_rows), None, part_rows)
    return tokens


def _sample_filtered(
    logits: torch.Tensor, rows: Sequence[SamplingRow], guesses: list[torch.Tensor] | None
) -> torch.Tensor:
    """Sample rows with top-k or top-p, from their best tokens if those decide it, else from all.

    With `guesses`, from their best tokens in any case.
    """
    vocab_size = logits.shape[1]
    top_k = [row.params.top_k if 0 < row.params.top_k < vocab_size else vocab_size for row in rows]
    top_p = _column([row.params.top_p for row in rows], logits)
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    count = min(vocab_size, max(_FIRST_CANDIDATES, *(2 * k for k in top_k if k < vocab_size), 0))
    while True:
        scores, ids = most_likely(logits, count)
        worst = scores[:, -1]
        ranks = torch.arange(count, device=logits.device)
        scores = scores.masked_fill(ranks >= _column(top_k, ranks), -torch.inf)
        # A row without top-k competes with its whole vocabulary, a row with it only with what top-k left.
        log_mass = torch.where(_column(top_k, ranks) <= count, scores.logsumexp(dim=-1, keepdim=True), log_total)
        probabilities = (scores - log_mass).exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        keep = ((scores > -torch.inf) & (before < top_p)) | (ranks == 0)  # the best token always stays
        scores = scores.masked_fill(~keep, -torch.inf)
        # Of those that equal the worst, others may be missing, so that none of them may be needed.
        falls_short = ~(scores.masked_fill(~keep, torch.inf).amin(dim=-1) > worst).all()
        if guesses is not None and count < vocab_size:
            guesses.append(falls_short)
        if guesses is not None or count == vocab_size or not bool(falls_short):
            return _draw(_apply_min_p(scores, rows), ids, rows)
        count = min(vocab_size, 64 * count)  # sorting all takes several times as long


def _apply_min_p(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    if all(row.params.min_p <= 0 for row in rows):
        return scores
    # p < min_p * p_max is the same as score < score_max + log(min_p), and needs no softmax.
    floor = scores.amax(dim=-1, keepdim=True) + _column([row.params.min_p for row in rows], scores).log()
    return scores.masked_fill(scores < floor, -torch.inf)


def _draw(scores: torch.Tensor, ids: torch.Tensor | None, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Gumbel-max over `scores`; column j stands for token `ids[:, j]`, or j when `ids` is None."""
    keys = _keys(rows, scores.device)
    if ids is not None:
        best = (scores + _gumbel(ids, keys)).argmax(dim=-1, keepdim=True)
        return ids.gather(1, best).squeeze(1)
    num_rows, vocab_size = scores.shape
    width = vocab_size if scores.is_cuda else max(1, _BLOCK_ELEMENTS // num_rows)
    blocks = []
    for start in range(0, vocab_size, width):
        tokens = torch.arange(start, min(start + width, vocab_size), device=scores.device)[None]
        blocks.append((scores[:, start : start + width] + _gumbel(tokens, keys)).max(dim=-1))
    best_block = torch.stack([block.values for block in blocks]).argmax(dim=0)
    best = torch.stack([block.indices for block in blocks]).gather(0, best_block[None]).squeeze(0)
    return best + best_block * width


def _gumbel(tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return _uniforms(tokens, keys).log_().neg_().log_().neg_()


def uniforms(tokens: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Numbers in (0, 1) that depend on (seed, position, token) alone.

    Args:
        tokens: int64 token ids, [rows or 1, n].
        rows: give seed and position.

    Returns:
        float32 [rows, n].
    """
    return _uniforms(tokens, _keys(rows, tokens.device))


def _keys(rows: Sequence[SamplingRow], device: torch.device) -> torch.Tensor:
    """One hash of seed and position a row, int64 [rows, 1]."""
    keys = [_signed(_key(row)) for row in rows]
    (moved,) = to_device([torch.tensor(keys, dtype=torch.int64)], device)
    return moved[:, None]


def _key(row: SamplingRow) -> int:
    return _mix(_mix(row.params.seed & _MASK64) ^ row.position)


def _uniforms(tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    # Two multiply-xorshift rounds in wrapping int64 arithmetic. `>>` keeps the sign, hence the masks.
    x = tokens * _signed(0x9E3779B97F4A7C15) ^ keys
    for _ in range(2):
        x = x.bitwise_xor_((x >> 32).bitwise_and_(0xFFFFFFFF)).mul_(_signed(0xD6E8FEB86659FD93))
    # 23 bits and a half: both ends stay strictly inside (0, 1) in float32, so that no noise is infinite.
    return (x >> 41).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def _mix(value: int) -> int:
    """Spread a 64-bit number over all its bits (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    (moved,) = to_device([torch.tensor(values, dtype=like.dtype)], like.device)
    return moved[:, None]
