"""Keys and values of all running requests, in blocks."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from epd.errors import ConfigError

_CPU_DEFAULT_BYTES = 1 << 30
_CPU_DEFAULT_SHARE = 0.25


@dataclass(frozen=True)
class KVShape:
    """What one token takes in the cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, text_config: Any, dtype: torch.dtype) -> KVShape:
        """Read it from the config of a transformers language model."""
        num_heads = text_config.num_attention_heads
        return cls(
            num_layers=text_config.num_hidden_layers,
            num_kv_heads=getattr(text_config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads,
            dtype=dtype,
        )

    def share_of(self, num_ranks: int) -> KVShape:
        """What one of several ranks keeps: its part of the heads. The number divides evenly."""
        return replace(self, num_kv_heads=self.num_kv_heads // num_ranks)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class PagedKVCache:
    """Two tensors per layer, [num_blocks, block_size, kv heads, head dim] each.

    Slot s of the flat views [num_blocks * block_size, kv heads, head dim] is token s % block_size of block
    s // block_size.
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate `num_blocks` blocks of `block_size` tokens."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        dims = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        self.keys = [_zeros(dims, shape.dtype, device) for _ in range(shape.num_layers)]
        self.values = [_zeros(dims, shape.dtype, device) for _ in range(shape.num_layers)]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new tokens.

        Args:
            layer: index of the layer.
            slots: int64 [tokens].
            keys: [tokens, kv heads, head dim].
            values: as `keys`.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def clear(self, layer: int, slots: torch.Tensor) -> None:
        """Zero `slots`, int64 [slots], of a layer."""
        self.keys[layer].flatten(0, 1).index_fill_(0, slots, 0)
        self.values[layer].flatten(0, 1).index_fill_(0, slots, 0)


def _zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not empty: attention masks unused slots by weight 0, and 0 * NaN would still be NaN.

    On a CPU straight from the kernel, which hands out pages when they are first written: `torch.zeros` writes them all,
    and so does numpy where tcmalloc is preloaded, a second for each gigabyte at start, for a worker that may stay idle.
    """
    if device.type != "cpu" or sys.platform == "win32":
        return torch.zeros(dims, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(dims) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages for attention to look up
    return torch.frombuffer(memory, dtype=dtype).view(dims)


def num_blocks_for(
    shape: KVShape,
    block_size: int,
    device: torch.device,
    *,
    memory_bytes: int | None,
    gpu_memory_utilization: float,
    reserved_bytes: int,
    max_useful_tokens: int,
) -> int:
    """How many blocks to allocate.

    Args:
        shape: what one token takes.
        block_size: tokens per block.
        device: where the cache goes; the weights are there already.
        memory_bytes: for the cache; None: on a GPU what `gpu_memory_utilization` of its memory leaves, else a modest
            share of free memory.
        gpu_memory_utilization: share of the GPU's memory that this process may use in all.
        reserved_bytes: kept free for activations (GPU).
        max_useful_tokens: more tokens than this can never be in use at once.

    Raises:
        ConfigError: not even one block fits.
    """
    if memory_bytes is not None:
        available = memory_bytes
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        available = int(free - (1 - gpu_memory_utilization) * total) - reserved_bytes
    else:
        available = min(_CPU_DEFAULT_BYTES, int(_CPU_DEFAULT_SHARE * _free_memory_bytes()))
    block_bytes = shape.bytes_per_token * block_size
    if available < block_bytes:
        raise ConfigError(
            f"no room for the KV cache: {available} bytes are left, one block takes {block_bytes}. "
            "Raise kv_cache_memory_bytes or gpu_memory_utilization, or lower max_num_batched_tokens."
        )
    return min(available // block_bytes, -(-max_useful_tokens // block_size))


def _free_memory_bytes() -> int:
    """Memory that can be had without swapping; a small guess where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30
