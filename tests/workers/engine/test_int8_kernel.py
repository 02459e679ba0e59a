"""Our kernel for products in eight bits, against the same arithmetic written out."""

from __future__ import annotations

import pytest
import torch

from workers.engine import int8_kernel

pytestmark = pytest.mark.skipif(
    not int8_kernel.is_available(), reason="needs a processor with AVX512-VNNI and a C++ compiler"
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def expected_of(
    rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    wide = rows.float()
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
    factor = torch.tensor(127.0) / largest  # not 127 / largest, which torch rounds twice
    rounded = (wide * factor).round().double()
    sums = (rounded @ codes.double().T).float()  # whole numbers below 2^53: exact
    factors = scales * (largest / 127)
    if bias is None:
        return (sums * factors).to(rows.dtype)
    # In float64 a product of two float32 is exact, and so this is rounded once, as by the kernel.
    return (sums.double() * factors.double() + bias.double()).float().to(rows.dtype)


def random_layer(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return codes, torch.rand(outputs) + 0.1, torch.randn(outputs)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (1, 1), (67, 130), (768, 200), (255, 16), (2048, 129)])
def test_sums_are_exact_for_any_number_of_rows(inputs: int, outputs: int) -> None:
    codes, scales, bias = random_layer(inputs, outputs)
    weight = int8_kernel.pack(codes)
    rows = torch.randn(40, inputs) * torch.rand(40, 1) * 50
    expected = expected_of(rows, codes, scales, bias)
    for count in range(1, 41):
        assert torch.equal(int8_kernel.linear(rows[:count], weight, scales, bias), expected[:count]), count


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_type_is_read_and_rounded_once(dtype: torch.dtype, with_bias: bool) -> None:
    codes, scales, bias = random_layer(96, 70)
    rows = torch.randn(3, 5, 96).to(dtype)
    given = bias if with_bias else None
    actual = int8_kernel.linear(rows, int8_kernel.pack(codes), scales / 1000, given)
    assert actual.dtype is dtype
    assert torch.equal(actual, expected_of(rows, codes, scales / 1000, given))


def test_the_largest_sums_do_not_overflow_or_saturate() -> None:
    codes = torch.full((64, 8192), 127, dtype=torch.int8)
    codes[::2] = -127
    rows = torch.ones(7, 8192)
    rows[::2] = -1
    actual = int8_kernel.linear(rows, int8_kernel.pack(codes), torch.ones(64), None)
    assert torch.equal(actual, expected_of(rows, codes, torch.ones(64), None))


def test_zeros_and_rows_apart_in_memory() -> None:
    codes, scales, bias = random_layer(64, 64)
    wide = torch.randn(6, 128)
    wide[2] = 0
    rows = wide[:, :64]
    actual = int8_kernel.linear(rows, int8_kernel.pack(codes), scales, bias)
    assert torch.equal(actual, expected_of(rows, codes, scales, bias))
    assert torch.equal(actual[2], bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_spreads_in_its_row_alone(dtype: torch.dtype, value: float) -> None:
    codes, scales, bias = random_layer(64, 128)
    rows = torch.ones(9, 64, dtype=dtype)
    rows[4, 33] = value
    actual = int8_kernel.linear(rows, int8_kernel.pack(codes), scales, bias)
    assert actual.isfinite().all(dim=-1).tolist() == [row != 4 for row in range(9)]
    assert not actual[4].isfinite().any()


def test_no_rows() -> None:
    codes, scales, bias = random_layer(64, 128)
    assert int8_kernel.linear(torch.empty(0, 64), int8_kernel.pack(codes), scales, bias).shape == (0, 128)


def test_more_threads_give_the_same() -> None:
    codes, scales, bias = random_layer(256, 320)
    weight, rows = int8_kernel.pack(codes), torch.randn(17, 256)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(int8_kernel.linear(rows, weight, scales, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
