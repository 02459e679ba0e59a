"""Both backends against attention written out plainly."""

from __future__ import annotations

import itertools

import pytest
import torch

from workers.engine import attention_varlen
from workers.engine.attention import AttentionBackend, PackedChunk, slot_mapping
from workers.engine.attention_sdpa import SdpaBackend
from workers.engine.attention_varlen import VarlenBackend
from workers.engine.paged_kv import KVShape, PagedKVCache

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 8, 4
CPU = torch.device("cpu")


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """q [n, heads, d] at positions start…; k, v [start + n, kv heads, d]."""
    repeat = HEADS // KV_HEADS
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(repeat, 1)) * 0.3
    allowed = torch.arange(k.shape[0])[None] <= torch.arange(start, start + q.shape[0])[:, None]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(repeat, 1))


# (start, length) of each chunk: decoding rows of several lengths first, then prompt chunks.
LAYOUTS = [
    [(0, 1)],
    [(2, 1), (3, 1), (4, 1), (30, 1), (31, 1), (32, 1)],
    [(0, 7)],
    [(5, 6)],
    [(1, 1), (9, 1), (0, 5), (8, 4), (3, 10)],
]


def paged_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """`varlen_attn` as documented, for the arguments that the backend uses."""
    assert (scale, window_size, enable_gqa, cu_seq_k) == (0.3, (-1, 0), True, None)
    assert block_table.dtype is seqused_k.dtype is cu_seq_q.dtype is torch.int32
    bounds = cu_seq_q.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert (max_q, max_k) == (max(lengths), max(seqused_k.tolist()))
    outputs = []
    for index, used in enumerate(seqused_k.tolist()):
        pages = block_table[index]
        k, v = (side[pages].flatten(0, 1)[:used] for side in (key, value))
        outputs.append(plain_attention(query[bounds[index] : bounds[index + 1]], k, v, used - lengths[index]))
    return torch.cat(outputs)


@pytest.mark.parametrize("backend_class", [SdpaBackend, VarlenBackend])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_plain_attention(
    layout: list[tuple[int, int]], backend_class: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of the CUDA backend is replaced by what its documentation says, so what we hand it is checked."""
    monkeypatch.setattr(attention_varlen, "varlen_attn", paged_reference)
    draw = torch.Generator().manual_seed(0)
    cache = PagedKVCache(KVShape(1, KV_HEADS, HEAD_DIM, torch.float32), 64, BLOCK, CPU)
    free = torch.randperm(64, generator=draw).tolist()
    backend = backend_class(cache, CPU)
    chunks, expected, packed, row = [], [], [], 0
    for start, length in layout:
        q = torch.randn(length, HEADS, HEAD_DIM, generator=draw)
        k, v = (torch.randn(start + length, KV_HEADS, HEAD_DIM, generator=draw) for _ in range(2))
        table = tuple(free.pop() for _ in range(-(-(start + length) // BLOCK) + 1))
        if start:
            slots = slot_mapping([PackedChunk(0, start, 0, table)], BLOCK)
            cache.write(0, torch.tensor(slots), k[:start], v[:start])
        chunks.append(PackedChunk(row, length, start, table))
        expected.append(plain_attention(q, k, v, start))
        packed.append((q, k[start:], v[start:]))
        row += length
    backend.prepare(chunks)
    q, k, v = (torch.cat(side) for side in zip(*packed, strict=True))
    torch.testing.assert_close(backend.forward(0, q, k, v, 0.3), torch.cat(expected))


def test_what_others_left_in_the_cache_does_not_spread() -> None:
    """NaN of a sequence whose values overflowed: in block 0, which it still has, and in blocks that it gave back."""
    cache = PagedKVCache(KVShape(1, KV_HEADS, HEAD_DIM, torch.float32), 16, BLOCK, CPU)
    cache.keys[0].fill_(torch.nan)
    cache.values[0].fill_(torch.nan)
    backend = SdpaBackend(cache, CPU)
    tables = [(1, 2, 3, 4), (5, 6, 7, 8)]

    def step(*places: tuple[int, int]) -> torch.Tensor:
        """(start, length) of each sequence's chunk."""
        row, chunks = 0, []
        for table, (start, length) in zip(tables, places, strict=True):
            chunks.append(PackedChunk(row, length, start, table))
            row += length
        backend.prepare(chunks)
        q, k, v = (torch.randn(row, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
        return backend.forward(0, q, k, v, 0.3)

    outputs = [step((0, 9), (0, 3)), step((9, 1), (3, 1)), step((10, 1), (4, 1)), step((11, 1), (5, 6))]
    assert all(bool(output.isfinite().all()) for output in outputs)
