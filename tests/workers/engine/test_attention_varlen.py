"""Whether the CUDA kernel is to be trusted is found by trying it; here formulas stand in for kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from epd.errors import ConfigError
from tests.workers.engine.varlen_reference import kernel
from workers.engine import attention_varlen, model_loader
from workers.engine.attention_varlen import PAGE_SIZE_MULTIPLE, VarlenBackend, VarlenBackendWithKeyBoundaries
from workers.engine.paged_kv import KVShape

SHAPE = KVShape(num_layers=4, num_kv_heads=2, head_dim=16, dtype=torch.bfloat16)
HEADS = 4
CPU = torch.device("cpu")


def wrong_window(*arguments: Any, **options: Any) -> torch.Tensor:
    return kernel(*arguments, **(options | {"window_size": (-1, 0)}))


def upper_left(*arguments: Any, **options: Any) -> torch.Tensor:
    """The causal mask at the wrong corner: a row sees what stands before its index in the chunk."""
    return kernel(*arguments, **(options | {"seqused_k": arguments[3].diff()}))


def missing(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def insists_on_key_boundaries(*arguments: Any, **options: Any) -> torch.Tensor:
    boundaries = arguments[4]
    if boundaries is None:
        raise RuntimeError("bad optional access")
    assert boundaries.tolist() == [0, *options["seqused_k"].cumsum(0).tolist()]
    assert boundaries.dtype is torch.int32
    return kernel(*arguments, **options)


@pytest.mark.parametrize(
    ("stand_in", "expected"),
    [
        (kernel, VarlenBackend),
        (insists_on_key_boundaries, VarlenBackendWithKeyBoundaries),
        (wrong_window, None),
        (upper_left, None),
        (missing, None),
    ],
)
def test_the_kernel_is_used_where_its_values_are_right(
    stand_in: Callable[..., torch.Tensor], expected: type[VarlenBackend] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_varlen, "varlen_attn", stand_in)
    assert attention_varlen.choose(SHAPE, HEADS, CPU) is expected


def test_on_a_cpu_it_is_not_even_tried() -> None:
    assert attention_varlen.find(SHAPE, HEADS, CPU) is None


def test_the_block_size_suits_the_kernel() -> None:
    assert model_loader._block_size(None, has_paged_kernel=False) == 16
    assert model_loader._block_size(None, has_paged_kernel=True) == PAGE_SIZE_MULTIPLE
    assert model_loader._block_size(2 * PAGE_SIZE_MULTIPLE, has_paged_kernel=True) == 2 * PAGE_SIZE_MULTIPLE
    with pytest.raises(ConfigError, match=r"block_size 16: .* multiple of 256"):
        model_loader._block_size(16, has_paged_kernel=True)
