"""Paged attention on a CPU: decoding rows by a kernel of our own, prompt chunks by SDPA.

The kernel reads the blocks where they lie. SDPA would need them gathered, padded and masked, which takes more time
than the attention itself. It also writes the step's keys and values, so that a layer of a decoding step is one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from workers.engine.attention import PackedChunk, slot_mapping
from workers.engine.attention_sdpa import SdpaBackend
from workers.engine.kernels import build
from workers.engine.paged_kv import PagedKVCache

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TOKENS_PER_PARTITION = 64
"""A context is not cut into smaller parts than this: merging them would take longer than what is gained."""
_TASKS_PER_THREAD = 4
_ALL = 1 << 62


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slots", "block_tables", "lengths", "partials")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "table_width", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("block_size", "shares", "partitions", "threads", "dtype")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "query", "key", "value", "key_cache", "value_cache")),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "key_row", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_row", "value_head", "window")),
        ("scale", ctypes.c_float),
    )


def is_available(dtype: torch.dtype) -> bool:
    """Whether the kernel takes `dtype` and there is a compiler to make it. The first call may take two seconds."""
    return dtype in _DTYPES and build.load("paged_attention") is not None


class CpuBackend(SdpaBackend):
    """Calls the kernel for decoding rows."""

    def __init__(self, cache: PagedKVCache, device: torch.device) -> None:
        """As the base class; `is_available` must hold for the cache's dtype."""
        super().__init__(cache, device)
        library = build.load("paged_attention")
        assert library is not None
        self._kernel = library.epd_paged_decode
        self._step = _Step()
        self._keep: tuple[torch.Tensor, ...] = ()
        """Memory that `_step` points to."""
        self._partials = torch.empty(0)

    def prepare(self, chunks: Sequence[PackedChunk]) -> None:
        """See the base class."""
        decodes = [chunk for chunk in chunks if chunk.length == 1]
        self._prefills = [self._prefill(chunk) for chunk in chunks if chunk.length > 1]
        slots = torch.tensor(slot_mapping(chunks, self.cache.block_size))
        width = max((self._num_blocks(chunk) for chunk in decodes), default=0)
        tables = [
            chunk.block_table[:width] + (0,) * (width - len(chunk.block_table)) for chunk in decodes
        ]  # the kernel reads none behind a row's length
        lengths = torch.tensor([chunk.end for chunk in decodes], dtype=torch.int32)
        block_tables = torch.tensor(tables, dtype=torch.int32)
        self._keep = (slots, lengths, block_tables)
        step = self._step
        step.slots, step.lengths, step.block_tables = slots.data_ptr(), lengths.data_ptr(), block_tables.data_ptr()
        step.tokens, step.rows, step.table_width = len(slots), len(decodes), width
        step.block_size = self.cache.block_size
        step.threads = torch.get_num_threads()
        step.heads = 0  # the first layer sets the rest
        self._longest = max((chunk.end for chunk in decodes), default=0)

    def forward(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """See the base class."""
        if queries.stride(2) != 1 or keys.stride(2) != 1 or values.stride(2) != 1:
            queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        if self._step.heads != queries.shape[1] or self._step.kv_heads != keys.shape[1]:
            self._size_step(queries, keys)
        output = torch.empty(queries.shape, dtype=queries.dtype)
        call = _Call(
            output.data_ptr(), queries.data_ptr(), keys.data_ptr(), values.data_ptr(),
            self.cache.keys[layer].data_ptr(), self.cache.values[layer].data_ptr(),
            *queries.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
            _ALL if window is None else window, scale,
        )  # fmt: skip
        if self._kernel(ctypes.byref(self._step), ctypes.byref(call)) != 0:
            raise AssertionError(f"the kernel takes no {queries.dtype}")
        if self._prefills:
            self._attend_prefills(layer, queries, keys, values, scale, window, output)
        return output

    def _size_step(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Set what follows from the model's shapes, and make room for partial results."""
        step = self._step
        _, step.heads, step.head_dim = queries.shape
        step.kv_heads, step.dtype = keys.shape[1], _DTYPES[queries.dtype]
        wanted = _TASKS_PER_THREAD * step.threads if step.threads > 1 else 1
        step.shares = _shares(step.kv_heads, -(-wanted // max(1, step.rows)))
        pairs = max(1, step.rows * step.shares)
        step.partitions = max(1, min(-(-wanted // pairs), self._longest // _TOKENS_PER_PARTITION))
        size = pairs * step.partitions * (step.heads // step.shares) * (step.head_dim + 2)
        if self._partials.numel() < size:
            self._partials = torch.empty(size)
        step.partials = self._partials.data_ptr()


def _shares(kv_heads: int, wanted: int) -> int:
    """The least number of equal parts of `kv_heads` that is `wanted` or more; one for each head at most."""
    wanted = min(wanted, kv_heads)
    return next(shares for shares in range(wanted, kv_heads + 1) if kv_heads % shares == 0)
