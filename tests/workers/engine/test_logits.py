"""Masks, biases and penalties against transformers' processors and against plain Python, one row at a time."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from epd.types import SamplingParams
from workers.engine.logits import process
from workers.engine.logits_state import LogitsState, is_needed
from workers.engine.sampler import NOTHING, SamplingRow, sample

VOCAB = 50
ENDING = (48, 49)

FEATURES: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "frequency_penalty": -0.3, "presence_penalty": 0.4},
    {"logit_bias": ((3, 5.0), (7, -100.0), (VOCAB, 1.0))},
    {"bad_words": ((4,), (5, 6), (5, 6, 7), (9, 9), (8, VOCAB))},
    {"allowed_token_ids": (1, 2, 3, 5, 6, 9, 48, VOCAB + 3)},
    {"min_tokens": 6},
    {
        "min_tokens": 3,
        "allowed_token_ids": tuple(range(20)),
        "bad_words": ((2,), (3, 4)),
        "logit_bias": ((5, 2.0), (30, 50.0)),
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
    },
]


def sequences(seed: int) -> tuple[list[int], list[int]]:
    """Prompt and answer, short of variety so that tokens repeat and words come about."""
    draw = random.Random(seed)
    return draw.choices(range(12), k=8), draw.choices(range(3, 12), k=draw.randrange(0, 9))


def state_of(params: SamplingParams, prompt: list[int], answer: list[int]) -> LogitsState:
    """As the engine makes it: token by token."""
    token_ids = list(prompt)
    state = LogitsState(params, token_ids, len(token_ids), ending=ENDING, vocab_size=VOCAB)
    for token in answer:
        token_ids.append(token)
        state.advance()
    return state


def plainly(logits: list[float], params: SamplingParams, prompt: list[int], answer: list[int]) -> list[float]:
    def is_masked(token: int) -> bool:
        if params.allowed_token_ids and token not in params.allowed_token_ids and token not in ENDING:
            return True
        if token in ENDING and len(answer) < params.min_tokens:
            return True
        words = [word for word in params.bad_words if word[-1] == token]
        return any(len(word) == 1 or tuple(answer[1 - len(word) :]) == word[:-1] for word in words)

    result = []
    for token, score in enumerate(logits):
        value = -math.inf if is_masked(token) else score + dict(params.logit_bias).get(token, 0.0)
        if token in prompt or token in answer:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * answer.count(token)
        value -= params.presence_penalty * (token in answer)
        result.append(value)
    return result


@pytest.mark.parametrize("features", FEATURES[1:], ids=lambda features: "+".join(features))
def test_each_feature_does_what_its_definition_says(features: dict[str, Any]) -> None:
    params = SamplingParams(**features)
    assert is_needed(params)
    logits = 3 * torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(1))
    cases = [sequences(seed) for seed in range(20)]
    expected = torch.tensor([plainly(logits[row].tolist(), params, *case) for row, case in enumerate(cases)])
    assert not torch.equal(expected, logits)
    process(logits, [(row, state_of(params, *case)) for row, case in enumerate(cases)], None)
    torch.testing.assert_close(logits, expected)


def test_repetition_penalty_is_that_of_transformers() -> None:
    params = SamplingParams(repetition_penalty=1.7)
    prompt, answer = sequences(3)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + answer]), logits.clone())
    process(logits, [(0, state_of(params, prompt, answer))], None)
    torch.testing.assert_close(logits, expected)


def test_counts_grow_past_what_was_reserved() -> None:
    params = SamplingParams(frequency_penalty=1.0)
    answer = [token % 400 for token in range(1000)]
    state = LogitsState(params, token_ids := [0], 1, ending=(), vocab_size=1000)
    token_ids += answer
    state.advance()
    logits = torch.zeros(1, 1000)
    process(logits, [(0, state)], None)
    assert logits[0].tolist() == [-3.0] * 200 + [-2.0] * 200 + [0.0] * 600


def mixed_rows() -> list[SamplingRow]:
    rows = []
    for index in range(40):
        params = SamplingParams(
            seed=index,
            temperature=(0.0, 1.0, 1.5)[index % 3],
            top_k=(0, 7)[index % 2],
            **FEATURES[index % len(FEATURES)],
        )
        state = state_of(params, *sequences(index)) if is_needed(params) else None
        rows.append(SamplingRow(params, index, state))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = mixed_rows()
    together = sample(logits.clone(), rows)
    assert together == [sample(logits[index : index + 1].clone(), [row])[0] for index, row in enumerate(rows)]
    # And features matter in it.
    assert together != sample(logits.clone(), [SamplingRow(row.params, row.position) for row in rows])


def test_rows_without_a_feature_keep_their_logits() -> None:
    logits = torch.randn(3, VOCAB)
    before = logits.clone()
    params = SamplingParams(temperature=0, allowed_token_ids=(5,))
    plain = SamplingParams(temperature=0)
    state = state_of(params, [1], [2])
    sample(logits, [SamplingRow(plain, 0), SamplingRow(params, 0, state), SamplingRow(plain, 0)])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert logits[1].isfinite().sum() == 1 + len(ENDING)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_a_row_in_which_everything_is_masked_gives_nothing(settings: dict[str, Any]) -> None:
    params = SamplingParams(min_tokens=1, allowed_token_ids=(5,), bad_words=((5,),), logprobs=2, **settings)
    open_params = SamplingParams(**settings)
    rows = [SamplingRow(params, 0, state_of(params, [1], [])), SamplingRow(open_params, 0)]
    nothing, something = sample(torch.randn(2, VOCAB), rows)
    assert nothing == (NOTHING, None)
    assert 0 <= something.token_id < VOCAB


def test_a_model_that_computes_nan_is_an_error_also_behind_masks() -> None:
    params = SamplingParams(presence_penalty=1.0)
    with pytest.raises(ArithmeticError, match="NaN"):
        sample(torch.full((1, VOCAB), torch.nan), [SamplingRow(params, 0, state_of(params, [1], [2]))])


def test_log_probabilities_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(4))
    expected = logits.log_softmax(-1)
    best = int(logits[0].argmax())
    params = SamplingParams(temperature=0.5, logprobs=3, bad_words=((best,),), presence_penalty=1.0)
    with_state = SamplingRow(params, 0, state_of(params, [1], [2]))
    first, second = sample(logits.clone(), [with_state, SamplingRow(SamplingParams(temperature=0, logprobs=0), 0)])
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert first.token_id != best
    assert first.logprobs.token_id == first.token_id
    assert first.logprobs.logprob == pytest.approx(expected[0, first.token_id].item(), abs=1e-5)
    order = expected[0].argsort(descending=True).tolist()
    assert first.logprobs.rank == order.index(first.token_id) + 1
    assert [token for token, _ in first.logprobs.top] == order[:3]
    assert [value for _, value in first.logprobs.top] == pytest.approx(expected[0, order[:3]].tolist(), abs=1e-5)
    assert (second.logprobs.rank, second.logprobs.top) == (1, ())
