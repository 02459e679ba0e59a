"""Our kernel for products in bfloat16, against the same products in float64."""

from __future__ import annotations

import pytest
import torch

from workers.engine import bf16_kernel

pytestmark = pytest.mark.skipif(
    not bf16_kernel.is_available(), reason="needs a processor with AVX512-BF16 and no AMX, and a C++ compiler"
)


def expected_of(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    products = rows.double() @ weight.double().T
    return products if bias is None else products + bias.double()


def random_layer(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()


def assert_rounded_once(actual: torch.Tensor, expected: torch.Tensor, inputs: int) -> None:
    """The sums of float products have an error far below the rounding to bfloat16, of 2^-9."""
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-6 * inputs)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (2, 1), (66, 130), (768, 200), (256, 16), (2048, 129)])
def test_products_of_any_number_of_rows_do_not_depend_on_the_others(inputs: int, outputs: int) -> None:
    weight, bias = random_layer(inputs, outputs)
    packed = bf16_kernel.pack(weight)
    rows = torch.randn(40, inputs).bfloat16()
    whole = bf16_kernel.linear(rows, packed, bias, outputs)
    assert_rounded_once(whole, expected_of(rows, weight, bias), inputs)
    for count in range(1, 40):
        assert torch.equal(bf16_kernel.linear(rows[:count], packed, bias, outputs), whole[:count]), count


@pytest.mark.parametrize("threads", [1, 3])
def test_many_panels_are_divided_among_threads(threads: int) -> None:
    weight, _ = random_layer(64, 64 * 37 + 5)
    rows = torch.randn(7, 64).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = bf16_kernel.linear(rows, bf16_kernel.pack(weight), None, len(weight))
    finally:
        torch.set_num_threads(before)
    assert_rounded_once(actual, expected_of(rows, weight, None), 64)


def test_leading_axes_rows_apart_in_memory_and_none_at_all() -> None:
    weight, bias = random_layer(64, 70)
    packed = bf16_kernel.pack(weight)
    wide = torch.randn(2, 3, 128).bfloat16()
    actual = bf16_kernel.linear(wide[..., :64], packed, bias, 70)
    assert actual.shape == (2, 3, 70)
    assert_rounded_once(actual, expected_of(wide[..., :64], weight, bias), 64)
    assert bf16_kernel.linear(wide[:0, :, :64], packed, bias, 70).shape == (0, 3, 70)


def test_what_is_no_number_stays_in_its_row() -> None:
    weight, bias = random_layer(64, 64)
    rows = torch.randn(5, 64).bfloat16()
    rows[1, 7], rows[3, 0] = torch.nan, torch.inf
    actual = bf16_kernel.linear(rows, bf16_kernel.pack(weight), bias, 64)
    assert actual[1].isnan().all()
    assert not actual[3].isfinite().any()
    assert actual[[0, 2, 4]].isfinite().all()
