"""The kernel for sequences in one piece, against attention in float32."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.engine import attention_dense
from workers.engine.attention import PackedChunk
from workers.engine.attention_sdpa import SdpaBackend
from workers.engine.paged_kv import KVShape, PagedKVCache

CPU = torch.device("cpu")
# Elsewhere nothing uses it.
needs_kernel = pytest.mark.skipif(
    not attention_dense.is_faster(torch.bfloat16, CPU), reason="needs AVX512-BF16 without AMX, and a C++ compiler"
)


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).bfloat16()


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, window: int | None = None
) -> torch.Tensor:
    """One sequence, in float32."""
    rows, tokens = len(q), len(k)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    if causal:
        mask = mask.tril(tokens - rows)
    if window is not None:
        mask = mask.triu(tokens - rows - window + 1)
    queries, keys, values = (side.float().transpose(0, 1)[None] for side in (q, k, v))
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=0.2, enable_gqa=True)
    return attended[0].transpose(0, 1)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.02)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 3, 80), (2, 1, 17)])
@pytest.mark.parametrize("row_lengths", [[1], [5, 64, 0, 150], [16, 16, 16]])
def test_sequences_see_themselves_and_nothing_else(
    row_lengths: list[int], heads: int, kv_heads: int, dim: int, threads: int
) -> None:
    ends = list(itertools.accumulate(row_lengths))
    q, k, v = (draw(ends[-1], n, dim, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = attention_dense.attend(q, k, v, 0.2, row_ends=ends)
    finally:
        torch.set_num_threads(before)
    parts = zip(*(torch.split(side, row_lengths) for side in (q, k, v)), strict=True)
    close(actual, torch.cat([plain(*part) for part in parts if len(part[0])]))


@needs_kernel
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (7, 7), (130, 130), (9, 200)])
def test_rows_of_a_prompt_see_what_stands_before_them(rows: int, tokens: int, window: int | None) -> None:
    q, k, v = draw(rows, 4, 32), draw(tokens, 2, 32, seed=1), draw(tokens, 2, 32, seed=2)
    actual = attention_dense.attend(q, k, v, 0.2, row_ends=[rows], token_ends=[tokens], causal=True, window=window)
    close(actual, plain(q, k, v, causal=True, window=window))


@needs_kernel
def test_strides_and_large_scores() -> None:
    """Sides that are slices of one tensor; scores whose exponentials exceed every float."""
    sides = draw(50, 3, 2, 32) * 30
    q, k, v = sides.unbind(1)
    close(attention_dense.attend(q, k, v, 0.2, row_ends=[50]) / 30, plain(q, k, v) / 30)


@needs_kernel
def test_what_memory_held_before_does_not_spread() -> None:
    """A thread's memory is used again: numbers of a longer sequence, NaN here, must not meet weights of 0."""
    attention_dense.attend(*(torch.full((64, 1, 32), torch.nan).bfloat16(),) * 3, 1.0, row_ends=[64])
    q, k, v = (draw(3, 1, 30, seed=seed) for seed in range(3))
    close(attention_dense.attend(q, k, v, 0.2, row_ends=[3]), plain(q, k, v))


@pytest.mark.parametrize(
    ("row_ends", "token_ends", "causal"),
    [([4], None, False), ([5, 3], None, False), ([3, 5], [5], False), ([5], [4], False), ([5], [6], False),
     ([3, 5], [2, 5], True), ([3, 5], [0, 5], False)],
)  # fmt: skip
def test_ends_that_don_t_fit_are_refused(row_ends: list[int], token_ends: Sequence[int] | None, causal: bool) -> None:
    side = draw(5, 2, 16)
    with pytest.raises(ValueError, match=r"sequence"):
        attention_dense.attend(side, side, side, 1.0, row_ends=row_ends, token_ends=token_ends, causal=causal)


def test_sides_that_don_t_fit_are_refused() -> None:
    side = draw(5, 2, 16)
    for wrong in (side.float(), side.transpose(1, 2), side[:, :, None], draw(5, 3, 16), draw(5, 2, 8)):
        with pytest.raises(ValueError, match=r"bfloat16|heads"):
            attention_dense.attend(side, wrong, wrong, 1.0, row_ends=[5])


@needs_kernel
def test_prompt_chunks_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start and from the middle of a prompt, beside one whose picture needs SDPA."""
    monkeypatch.setattr(attention_dense, "WORTHWHILE_SCORES", 1)
    calls: list[int] = []
    attend = attention_dense.attend

    def count(queries: torch.Tensor, *sides: Any, **ends: Any) -> torch.Tensor:
        calls.append(len(queries))
        return attend(queries, *sides, **ends)

    monkeypatch.setattr(attention_dense, "attend", count)
    cache = PagedKVCache(KVShape(1, 2, 32, torch.bfloat16), 32, 4, CPU)
    backend = SdpaBackend(cache, CPU)
    q, k, v = draw(30, 4, 32), draw(30, 2, 32, seed=1), draw(30, 2, 32, seed=2)
    tables = [(0, 1, 2), (3, 4, 5, 6)]
    backend.prepare([PackedChunk(0, 9, 0, tables[0])])
    close(backend.forward(0, q[:9], k[:9], v[:9], 0.2), plain(q[:9], k[:9], v[:9], causal=True))
    backend.prepare([PackedChunk(0, 3, 9, tables[0]), PackedChunk(3, 13, 0, tables[1], ((2, 6),))])
    actual = backend.forward(0, q[9:25], k[9:25], v[9:25], 0.2)
    close(actual[:3], plain(q[9:12], k[:12], v[:12], causal=True))
    close(actual[3 + 6 :], plain(q[12:25], k[12:25], v[12:25], causal=True)[6:])
    seen = plain(q[14:18], k[12:18], v[12:18])  # a span sees all of itself
    close(actual[5:9], seen)
    assert calls == [9, 3]
