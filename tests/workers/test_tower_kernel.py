"""Kernels for what stands between the products of a tower, against what transformers computes there."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from workers import tower_kernel

pytestmark = pytest.mark.skipif(
    not tower_kernel.is_available(), reason="needs a processor with AVX512-BF16 and a C++ compiler"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("width", [64, 80, 6])
def test_heads_are_rotated(width: int) -> None:
    """Queries and keys lie beside values, and halves of a head need not fill a register."""
    sides = torch.randn(37, 9, width).bfloat16()
    angles = torch.randn(37, width // 2).repeat(1, 2)
    cosines, sines = angles.cos(), angles.sin()
    expected = torch.cat(qwen.apply_rotary_pos_emb_vision(sides[:, :3], sides[:, 3:6], cosines, sines), dim=1)
    actual = tower_kernel.rotate(sides[:, :6], cosines, sines)
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("width", [512, 40])
def test_rows_are_normalised(width: int) -> None:
    norm = qwen.Qwen2_5_VLRMSNorm(width, eps=1e-6).bfloat16()
    norm.weight.data.normal_()
    rows = (torch.randn(2, 21, width) * 30).bfloat16()
    rows[0, 3] = 0
    actual = tower_kernel.normalise(rows, norm.weight, norm.variance_epsilon)
    torch.testing.assert_close(actual, norm(rows), rtol=2**-7, atol=1e-30)


def test_gates_of_any_size_and_of_rows_apart_in_memory() -> None:
    both = (torch.randn(19, 2 * 70) * 40).bfloat16()
    both[2, 0], both[3, 1], both[4, 2], both[5, 3] = torch.nan, torch.inf, 300, -300
    left, right = both[:, :70], both[:, 70:]
    actual = tower_kernel.gate(left, right)
    torch.testing.assert_close(actual, silu(left) * right, rtol=2**-6, atol=1e-30, equal_nan=True)
