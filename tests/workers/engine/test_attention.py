"""Both backends against attention written out plainly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch

from workers.engine import attention_cpu, attention_varlen
from workers.engine.attention import AttentionBackend, PackedChunk, slot_mapping
from workers.engine.attention_cpu import CpuBackend
from workers.engine.attention_sdpa import SdpaBackend
from workers.engine.attention_varlen import VarlenBackend
from workers.engine.paged_kv import KVShape, PagedKVCache

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 8, 4
CPU = torch.device("cpu")
# The kernel needs a compiler; where there is none, nothing uses it.
CPU_BACKENDS: list[type[SdpaBackend]] = [SdpaBackend, *[CpuBackend] * attention_cpu.is_available(torch.float32)]


Span = tuple[int, int]


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, window: int | None = None, spans: Sequence[Span] = ()
) -> torch.Tensor:
    """q [n, heads, d] at positions start…; k, v [start + n, kv heads, d]; `spans` are bidirectional."""
    repeat = HEADS // KV_HEADS
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(repeat, 1)) * 0.3
    allowed = torch.tensor(
        [
            [
                (column <= row or any(first <= row < last and first <= column < last for first, last in spans))
                and (window is None or column > row - window)
                for column in range(k.shape[0])
            ]
            for row in range(start, start + q.shape[0])
        ]
    )
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
    assert (scale, window_size[1], enable_gqa, cu_seq_k) == (0.3, 0, True, None)
    window = None if window_size[0] < 0 else window_size[0] + 1
    assert block_table.dtype is seqused_k.dtype is cu_seq_q.dtype is torch.int32
    bounds = cu_seq_q.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert (max_q, max_k) == (max(lengths), max(seqused_k.tolist()))
    outputs = []
    for index, used in enumerate(seqused_k.tolist()):
        pages = block_table[index]
        k, v = (side[pages].flatten(0, 1)[:used] for side in (key, value))
        outputs.append(plain_attention(query[bounds[index] : bounds[index + 1]], k, v, used - lengths[index], window))
    return torch.cat(outputs)


def check(
    backend_class: type[AttentionBackend],
    layout: Sequence[tuple[int, int]],
    windows: Sequence[int | None],
    spans: Mapping[int, tuple[Span, ...]] | None = None,
) -> None:
    """One step through all layers, of which layer i has `windows[i]`; `spans` of chunk i are bidirectional."""
    spans = spans or {}
    draw = torch.Generator().manual_seed(0)
    cache = PagedKVCache(KVShape(len(windows), KV_HEADS, HEAD_DIM, torch.float32), 64, BLOCK, CPU)
    free = torch.randperm(64, generator=draw).tolist()
    backend = backend_class(cache, CPU)
    chunks, sides, row = [], [], 0
    for index, (start, length) in enumerate(layout):
        q = torch.randn(length, HEADS, HEAD_DIM, generator=draw)
        k, v = (torch.randn(start + length, KV_HEADS, HEAD_DIM, generator=draw) for _ in range(2))
        table = tuple(free.pop() for _ in range(-(-(start + length) // BLOCK) + 1))
        if start:
            slots = torch.tensor(slot_mapping([PackedChunk(0, start, 0, table)], BLOCK))
            for layer in range(len(windows)):
                cache.write(layer, slots, k[:start], v[:start])
        chunks.append(PackedChunk(row, length, start, table, spans.get(index, ())))
        sides.append((q, k, v, start))
        row += length
    backend.prepare(chunks)
    q = torch.cat([q for q, _, _, _ in sides])
    k = torch.cat([k[start:] for _, k, _, start in sides])
    v = torch.cat([v[start:] for _, _, v, start in sides])
    for layer, window in enumerate(windows):
        expected = [plain_attention(*side, window, spans.get(index, ())) for index, side in enumerate(sides)]
        torch.testing.assert_close(backend.forward(layer, q, k, v, 0.3, window), torch.cat(expected))


@pytest.mark.parametrize("backend_class", [*CPU_BACKENDS, VarlenBackend])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_plain_attention(
    layout: list[tuple[int, int]], backend_class: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of the CUDA backend is replaced by what its documentation says, so what we hand it is checked."""
    monkeypatch.setattr(attention_varlen, "varlen_attn", paged_reference)
    check(backend_class, layout, [None])


@pytest.mark.parametrize("backend_class", [*CPU_BACKENDS, VarlenBackend])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_with_sliding_windows_beside_full_ones(
    layout: list[tuple[int, int]], backend_class: type[AttentionBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_varlen, "varlen_attn", paged_reference)
    check(backend_class, layout, [3, None, 1, 100, 3])


@pytest.mark.parametrize("windows", [[None], [4, None], [2, 6]])
def test_tokens_of_a_bidirectional_span_see_what_follows(windows: list[int | None]) -> None:
    """In the middle of a chunk, at both its ends, and none; with windows shorter and longer than a span."""
    layout = [(7, 1), (0, 9), (5, 11), (3, 6), (0, 4)]
    spans: dict[int, tuple[Span, ...]] = {1: ((2, 6),), 2: ((5, 9), (11, 16)), 4: ((0, 4),)}
    check(SdpaBackend, layout, windows, spans)


@pytest.mark.parametrize("backend_class", CPU_BACKENDS)
def test_what_others_left_in_the_cache_does_not_spread(backend_class: type[SdpaBackend]) -> None:
    """NaN of a sequence whose values overflowed: in block 0, which it still has, and in blocks that it gave back."""
    cache = PagedKVCache(KVShape(1, KV_HEADS, HEAD_DIM, torch.float32), 16, BLOCK, CPU)
    cache.keys[0].fill_(torch.nan)
    cache.values[0].fill_(torch.nan)
    backend = backend_class(cache, CPU)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(("kv_heads", "num_threads"), [(2, 2), (6, 2), (6, 1)])
def test_long_contexts_in_every_type(dtype: torch.dtype, head_dim: int, kv_heads: int, num_threads: int) -> None:
    """With two threads the kernel cuts contexts into parts and merges what they give, and kv heads into shares: of two
    there is one in each, of six there are two."""
    draw = torch.Generator().manual_seed(0)
    shape = KVShape(1, kv_heads, head_dim, dtype)
    starts, blocks = (3, 150, 700), list(range(64))
    chunks = []
    for row, start in enumerate(starts):
        needed = start // 16 + 1
        chunks.append(PackedChunk(row, 1, start, tuple(blocks[:needed])))
        blocks = blocks[needed:]
    history = torch.randn(2, 64 * 16, kv_heads, head_dim, generator=draw).to(dtype)
    # As a model lays them out: [heads, tokens, head dim].
    counts = (HEADS // KV_HEADS * kv_heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(n, len(starts), head_dim, generator=draw).to(dtype).transpose(0, 1) for n in counts)
    expected = []
    for row, chunk in enumerate(chunks):
        slots = slot_mapping([PackedChunk(0, chunk.end, 0, chunk.block_table)], 16)
        keys, values = (side[slots].float() for side in history)
        keys[-1], values[-1] = k[row].float(), v[row].float()
        expected.append(plain_attention(q[row : row + 1].float(), keys, values, chunk.start))
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for backend_class in CPU_BACKENDS:
            cache = PagedKVCache(shape, 64, 16, CPU)
            cache.write(0, torch.arange(64 * 16), history[0], history[1])
            backend = backend_class(cache, CPU)
            backend.prepare(chunks)
            output = backend.forward(0, q, k, v, 0.3)
            # Scores and sums are float32 inside, whatever comes in and goes out.
            torch.testing.assert_close(
                output.float(), torch.cat(expected), rtol=0, atol=max(5e-6, 2 * torch.finfo(dtype).eps)
            )
            last = slot_mapping(chunks, 16)
            torch.testing.assert_close(cache.keys[0].flatten(0, 1)[last], k, rtol=0, atol=0)
            torch.testing.assert_close(cache.values[0].flatten(0, 1)[last], v, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
