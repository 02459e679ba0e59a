"""Paged attention through `scaled_dot_product_attention`: runs everywhere, made for the CPU.

Decoding rows are batched: the blocks of their sequences are gathered into [rows, blocks * block_size] and attended
with a mask for the padding. Rows are grouped by the power of two of their length, so padding at most doubles the work
while a batch of equals stays one call. Prompt chunks are attended one by one.

Masked slots are read all the same, and 0 * NaN is NaN. So they must hold finite numbers: the rest of a block is cleared
when a sequence enters it, since another one may have left NaN there, and padding repeats a block of the same sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.engine import attention_dense
from workers.engine.attention import AttentionBackend, PackedChunk
from workers.engine.paged_kv import PagedKVCache


@dataclass(frozen=True)
class _DecodeGroup:
    rows: slice
    blocks: torch.Tensor
    """[rows * blocks per row], padded with the first block of the row."""
    lengths: torch.Tensor
    """[rows, 1]: tokens of each row's sequence."""
    slots: torch.Tensor
    """[slots]: 0, 1, 2, …"""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    """By window: [rows, 1, 1, slots]: True where a slot holds a token that the row sees."""

    def mask(self, window: int | None) -> torch.Tensor:
        if window not in self.masks:
            seen = self.slots < self.lengths
            if window is not None:
                seen &= self.slots >= self.lengths - window
            self.masks[window] = seen[:, None, None]
        return self.masks[window]


@dataclass(frozen=True)
class _Prefill:
    chunk: PackedChunk
    blocks: torch.Tensor | None
    """Blocks of the sequence; None when the chunk is all there is, so that the cache need not be read."""
    device: torch.device
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)
    """By window: [chunk, tokens so far]; None: plainly causal."""

    def mask(self, window: int | None) -> torch.Tensor | None:
        if window not in self.masks:
            self.masks[window] = self._make_mask(window)
        return self.masks[window]

    def _make_mask(self, window: int | None) -> torch.Tensor | None:
        chunk = self.chunk
        if window is not None and chunk.end <= window:
            return self.mask(None)  # the window holds all there is
        if window is None and chunk.start == 0 and not chunk.bidirectional:
            return None
        # Aligned at the lower right: row i of the chunk sees everything before the chunk and its rows up to i.
        mask = torch.ones(chunk.length, chunk.end, dtype=torch.bool, device=self.device).tril(chunk.start)
        for first, last in chunk.bidirectional:
            mask[first - chunk.start : last - chunk.start, first:last] = True
        return mask if window is None else mask.triu(chunk.start - window + 1)


class SdpaBackend(AttentionBackend):
    """Gathers blocks, then calls SDPA, or for prompts what is faster on this processor (`attention_dense`)."""

    def __init__(self, cache: PagedKVCache, device: torch.device) -> None:
        """See the base class."""
        super().__init__(cache, device)
        self._has_kernel = attention_dense.is_faster(cache.keys[0].dtype, device)
        self._groups: list[_DecodeGroup] = []
        self._prefills: list[_Prefill] = []
        self._unwritten = torch.empty(0, dtype=torch.int64)
        """Slots behind the last token of blocks that are entered in this step."""

    def _prepare(self, chunks: Sequence[PackedChunk]) -> None:
        decodes = [chunk for chunk in chunks if chunk.length == 1]
        self._groups = [
            self._decode_group(list(group)) for _, group in itertools.groupby(decodes, key=self._length_class)
        ]
        self._prefills = [self._prefill(chunk) for chunk in chunks if chunk.length > 1]
        unwritten = [slot for chunk in chunks for slot in self._unwritten_slots(chunk)]
        self._unwritten = torch.tensor(unwritten, dtype=torch.int64, device=self.device)

    def _unwritten_slots(self, chunk: PackedChunk) -> range:
        size = self.cache.block_size
        last = self._num_blocks(chunk) - 1
        if chunk.start > last * size:  # the block was entered before
            return range(0)
        return range(chunk.block_table[last] * size + chunk.end - last * size, (chunk.block_table[last] + 1) * size)

    def _length_class(self, chunk: PackedChunk) -> int:
        return (self._num_blocks(chunk) - 1).bit_length()

    def _num_blocks(self, chunk: PackedChunk) -> int:
        return -(-chunk.end // self.cache.block_size)

    def _decode_group(self, chunks: list[PackedChunk]) -> _DecodeGroup:
        width = max(self._num_blocks(chunk) for chunk in chunks)
        tables = [self._padded_table(chunk, width) for chunk in chunks]
        lengths = torch.tensor([chunk.end for chunk in chunks], device=self.device)
        slots = torch.arange(width * self.cache.block_size, device=self.device)
        return _DecodeGroup(
            rows=slice(chunks[0].first_row, chunks[-1].first_row + 1),
            blocks=torch.tensor(tables, device=self.device).flatten(),
            lengths=lengths[:, None],
            slots=slots,
        )

    def _padded_table(self, chunk: PackedChunk, width: int) -> list[int]:
        own = chunk.block_table[: self._num_blocks(chunk)]  # those behind it were not entered yet
        return [*own, *own[:1] * (width - len(own))]

    def _prefill(self, chunk: PackedChunk) -> _Prefill:
        if chunk.start == 0:
            return _Prefill(chunk, None, self.device)
        blocks = torch.tensor(chunk.block_table[: self._num_blocks(chunk)], device=self.device)
        return _Prefill(chunk, blocks, self.device)

    def _attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if len(self._unwritten):
            self.cache.clear(layer, self._unwritten)
        output = torch.empty_like(queries)
        for group in self._groups:
            output[group.rows] = self._attend_decode(layer, group, queries[group.rows], scale, window)
        self._attend_prefills(layer, queries, keys, values, scale, window, output)
        return output

    def _attend_prefills(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        output: torch.Tensor,
    ) -> None:
        """Write what the rows of prompt chunks attend to into `output`; the cache holds their keys and values."""
        for prefill in self._prefills:
            rows = prefill.chunk.rows
            k, v = keys[rows], values[rows]
            if prefill.blocks is not None:
                k, v = (side[: prefill.chunk.end] for side in self._gather(layer, prefill.blocks))
            if self._takes_kernel(prefill.chunk):
                ends = {"row_ends": (prefill.chunk.length,), "token_ends": (prefill.chunk.end,)}
                output[rows] = attention_dense.attend(queries[rows], k, v, scale, **ends, causal=True, window=window)
            else:
                output[rows] = _attend_prefill(queries[rows], k, v, prefill.mask(window), scale)

    def _takes_kernel(self, chunk: PackedChunk) -> bool:
        is_long = chunk.length * chunk.end >= attention_dense.WORTHWHILE_SCORES
        return self._has_kernel and is_long and not chunk.bidirectional

    def _attend_decode(
        self, layer: int, group: _DecodeGroup, queries: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        rows, heads, head_dim = queries.shape
        keys, values = self._gather(layer, group.blocks)
        kv_heads = keys.shape[1]
        # The query heads that share a kv head stand in as its query positions, so that no key is repeated.
        q = queries.reshape(rows, kv_heads, heads // kv_heads, head_dim)
        k, v = (side.view(rows, -1, kv_heads, head_dim).transpose(1, 2) for side in (keys, values))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=group.mask(window), scale=scale)
        return attended.reshape(rows, heads, head_dim)

    def _gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole blocks, [len(blocks) * block_size, kv heads, head dim] each."""
        # index_select copies block by block; plain indexing was four times slower on a CPU.
        keys = self.cache.keys[layer].index_select(0, blocks)
        values = self.cache.values[layer].index_select(0, blocks)
        return keys.flatten(0, 1), values.flatten(0, 1)


def _attend_prefill(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """One chunk: queries [n, heads, head dim], keys and values [tokens, kv heads, head dim]."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (queries, keys, values))
    attended = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return attended[0].transpose(0, 1)
