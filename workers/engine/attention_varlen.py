"""Paged attention on CUDA through the FlashAttention kernels inside torch: one call per layer for the whole step.

`varlen_attn` reads the paged cache directly: `block_table` [sequences, blocks] names each sequence's pages and
`seqused_k` [sequences] how many tokens of them count. Its causal mask is aligned at the lower right, which is what
both a decoding row and a prompt chunk with context need, so nothing distinguishes them here.

FlashAttention 2, which torch ships, takes pages of a multiple of `PAGE_SIZE_MULTIPLE` tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch.nn.attention.varlen import varlen_attn

from workers.engine.attention import AttentionBackend, PackedChunk

PAGE_SIZE_MULTIPLE = 256


def is_available(device: torch.device) -> bool:
    """Whether the device has the kernel, and this torch lets it read pages."""
    return device.type == "cuda" and "block_table" in inspect.signature(varlen_attn).parameters


class VarlenBackend(AttentionBackend):
    """Hands the block tables to the kernel."""

    _cu_seq_q: torch.Tensor
    _seqused_k: torch.Tensor
    _block_table: torch.Tensor
    _max_q: int
    _max_k: int

    def _prepare(self, chunks: Sequence[PackedChunk]) -> None:
        boundaries = [0, *(chunk.first_row + chunk.length for chunk in chunks)]
        width = max(len(chunk.block_table) for chunk in chunks)
        tables = [[*chunk.block_table, *[0] * (width - len(chunk.block_table))] for chunk in chunks]
        self._cu_seq_q = self._int32(boundaries)
        self._seqused_k = self._int32([chunk.end for chunk in chunks])
        self._block_table = self._int32(tables)
        self._max_q = max(chunk.length for chunk in chunks)
        self._max_k = max(chunk.end for chunk in chunks)

    def _int32(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        output = varlen_attn(
            queries,
            self.cache.keys[layer],
            self.cache.values[layer],
            self._cu_seq_q,
            None,
            self._max_q,
            self._max_k,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),  # the kernel does not count the token itself
            enable_gqa=queries.shape[1] != keys.shape[1],
            seqused_k=self._seqused_k,
            block_table=self._block_table,
        )
        assert isinstance(output, torch.Tensor)
        return output
