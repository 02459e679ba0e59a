from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from epd.types import SamplingParams
from workers.engine import draw_kernel
from workers.engine.logits_state import LogitsState
from workers.engine.sampler import SamplingRow, uniforms
from workers.engine.sampler import sample as sample_rows

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5])


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    return [sampled.token_id for sampled in sample_rows(logits, rows)]


def rows(count: int, seed: int = 1, **params: Any) -> list[SamplingRow]:
    return [SamplingRow(SamplingParams(seed=seed, **params), position) for position in range(count)]


def frequencies(logits: torch.Tensor, count: int = 20_000, **params: Any) -> torch.Tensor:
    tokens = sample(logits.repeat(count, 1), rows(count, **params))
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel()) / count


def close(measured: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within five standard deviations of 20000 draws."""
    return bool(((measured - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all())


def test_greedy_takes_the_best() -> None:
    logits = torch.stack([LOGITS, -LOGITS])
    assert sample(logits, rows(2, temperature=0)) == [0, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_equals_as_transformers_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 50, (16, 1000)).to(dtype)  # each number many times
    assert sample(logits.clone(), rows(16, temperature=0.0)) == logits.float().argmax(dim=-1).tolist()


def test_a_hardly_positive_temperature_is_greedy() -> None:
    assert sample(LOGITS[None].clone(), rows(1, temperature=1e-40)) == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    assert close(frequencies(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(0))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 1, 5]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.6}, [0, 1]),  # 0.54 alone is less than 0.6
        ({"top_p": 0.5}, [0]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.3}, [0, 1]),  # exp(-1) = 0.37, exp(-1.5) = 0.22
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 5]),
        ({"top_k": 2, "top_p": 0.7}, [0]),  # top-k leaves 0.73 and 0.27
        ({"top_k": 5, "min_p": 0.2}, [0, 1, 5]),
    ],
)
def test_filters_keep_the_right_tokens_in_the_right_shares(params: dict[str, Any], kept: list[int]) -> None:
    expected = torch.zeros_like(LOGITS)
    expected[kept] = LOGITS[kept].softmax(0)
    assert close(frequencies(LOGITS, **params), expected)


def test_top_p_over_more_tokens_than_it_looks_at_first() -> None:
    logits = torch.zeros(1000)
    logits[0] = 1e-3
    tokens = sample(logits.repeat(4000, 1), rows(4000, top_p=0.8))
    assert 780 <= len(set(tokens)) <= 800


def test_mixed_batch_gives_each_row_what_it_gets_alone() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"top_k": 2},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
    ]
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    batch = [
        SamplingRow(SamplingParams(seed=index // 3, **kinds[index % len(kinds)]), 7 * index) for index in range(60)
    ]
    together = sample(logits.clone(), batch)
    alone = [sample(logits[index : index + 1].clone(), [row])[0] for index, row in enumerate(batch)]
    assert together == alone


@pytest.mark.parametrize("params", [{"top_k": 20}, {"top_k": 300}, {"top_p": 0.6}, {"top_k": 400, "top_p": 0.6}])
def test_which_of_equals_a_filter_keeps_does_not_depend_on_the_batch(params: dict[str, Any]) -> None:
    logits = torch.randint(0, 40, (100, 5000), generator=torch.Generator().manual_seed(0)).bfloat16() / 8
    alone = [sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows(100, **params))]
    for neighbour in ({"top_k": 1000}, {"top_p": 0.999}):
        batch = [*rows(100, **params), *rows(1, **neighbour)]
        assert sample(torch.cat([logits, logits[:1]]), batch)[:100] == alone


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.25}])
def test_the_first_of_equals_stay(params: dict[str, Any]) -> None:
    logits = torch.zeros(10)
    assert set(sample(logits.repeat(200, 1), rows(200, **params))) == {0, 1, 2}


def test_noise_depends_on_seed_and_position() -> None:
    logits = torch.zeros(1, 1000)
    drawn = {
        (seed, position): sample(logits, [SamplingRow(SamplingParams(seed=seed), position)])[0]
        for seed in (0, 1, -1, 2**63, 2**64 - 2)
        for position in range(20)
    }
    assert len(set(drawn.values())) > 85
    assert drawn[0, 3] == sample(logits, [SamplingRow(SamplingParams(seed=0), 3)])[0]


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    values = uniforms(torch.arange(2000)[None], rows(200))
    assert values.min() > 0
    assert values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.003
    assert abs(values.var().item() - 1 / 12) < 0.001
    for neighbour in (values.roll(1, 0), values.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([values.flatten(), neighbour.flatten()]))[0, 1]
        assert abs(correlation.item()) < 0.01


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_ends_never_come_too_early(params: dict[str, Any]) -> None:
    sampling = SamplingParams(min_tokens=1, **params)
    row = SamplingRow(sampling, 0, LogitsState(sampling, [5], 1, ending=(0, 1), vocab_size=6))
    assert sample(LOGITS[None].clone(), [row])[0] not in (0, 1)


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    assert close(frequencies(LOGITS.bfloat16()), LOGITS.softmax(0))


@pytest.mark.parametrize("vocab_size", [1, 7, 70_000, 200_001])
def test_a_large_vocabulary_is_drawn_from_as_a_whole(vocab_size: int) -> None:
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0))
    batch = rows(3)
    noise = -(-uniforms(torch.arange(vocab_size)[None], batch).log()).log()
    expected = (logits + noise).argmax(dim=-1).tolist()
    assert sample(logits, batch) == expected
    assert [sample(logits[index : index + 1], [batch[index]])[0] for index in range(3)] == expected


def test_greedy_takes_the_first_of_equals_in_bfloat16_too() -> None:
    logits = torch.randint(0, 4, (20, 500), generator=torch.Generator().manual_seed(0)).bfloat16()
    first = [row.index(max(row)) for row in logits.tolist()]
    assert sample(logits, rows(20, temperature=0)) == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, -60.0])  # with values of both signs in each row, and with none above zero
def test_the_best_of_16_bit_floats_is_that_of_the_floats(dtype: torch.dtype, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.cat([torch.randn(20, 999, generator=generator) * 8 + shift, torch.full((20, 1), -torch.inf)], dim=1)
    logits[0] = -torch.inf
    logits[1].clamp_(max=-0.0)[7] = 0.0  # behind others that equal it
    logits[2, 5] = torch.inf
    logits = logits.to(dtype)
    assert sample(logits, rows(20, temperature=0)) == logits.float().argmax(dim=-1).tolist()


@pytest.mark.parametrize("is_negative", [False, True])
@pytest.mark.parametrize(
    ("dtype", "same_size", "nan"),
    [
        (torch.float32, torch.int32, 0x7FC00000),
        (torch.bfloat16, torch.int16, 0x7FC0),
        (torch.float16, torch.int16, 0x7E00),
    ],
)
def test_one_value_that_is_no_number_is_found_wherever_it_stands(
    dtype: torch.dtype, same_size: torch.dtype, nan: int, is_negative: bool
) -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits.view(same_size)[2, 17] = nan + (torch.iinfo(same_size).min if is_negative else 0)
    with pytest.raises(ArithmeticError, match="NaN"):
        sample(logits, rows(4, temperature=0))


@pytest.mark.skipif(not draw_kernel.is_available(LOGITS), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_the_kernel_draws_the_same_tokens_as_torch(
    dtype: torch.dtype, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(40, 5003, generator=generator) * spread).to(dtype)
    logits[::5, 2000:] = -torch.inf  # as masks do
    logits[7] = -torch.inf
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.3},
        {"min_p": 0.1},
        {},
        {"temperature": 0.0},
        {"top_k": 5},
        {"temperature": 2.0, "min_p": 0.01},
    ]
    batch = [SamplingRow(SamplingParams(seed=index, **kinds[index % 6]), 3 * index) for index in range(40)]
    drawn = sample(logits, batch)
    monkeypatch.setattr(draw_kernel, "is_available", lambda _: False)
    assert drawn == sample(logits, batch)
    assert len(set(drawn)) > 20 or spread > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_drawn_from_tells_of_a_value_that_is_no_number(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[2, 17] = torch.nan
    with pytest.raises(ArithmeticError, match="NaN"):
        sample(logits, rows(4))
