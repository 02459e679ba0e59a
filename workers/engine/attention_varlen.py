"""Paged attention on CUDA through the FlashAttention kernels inside torch: one call per layer for the whole step.

`varlen_attn` reads the paged cache directly: `block_table` [sequences, blocks] names each sequence's pages and
`seqused_k` [sequences] how many tokens of them count. Its causal mask is aligned at the lower right, which is what
both a decoding row and a prompt chunk with context need, so nothing distinguishes them here.

FlashAttention 2, which torch ships, takes pages of a multiple of `PAGE_SIZE_MULTIPLE` tokens, in half precision.
Which GPUs, head sizes and arguments a build of torch takes is not for us to list, so `find` tries the kernel on a few
tokens of the model's own shape and compares; where it fails, `SdpaBackend` runs on the GPU too.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention.varlen import varlen_attn

from workers.engine.attention import AttentionBackend, PackedChunk
from workers.engine.attention_sdpa import SdpaBackend
from workers.engine.paged_kv import KVShape, PagedKVCache
from workers.engine.transfer import to_device

log = logging.getLogger(__name__)

PAGE_SIZE_MULTIPLE = 256
_TOLERANCE = 0.05
"""Between two right answers to `_works` in bfloat16. Its values are of the order of 1."""


@dataclass(frozen=True)
class Places:
    """What the kernel must know of a step."""

    slots: torch.Tensor
    """int64 [tokens]: where the new keys and values go."""
    cu_seq_q: torch.Tensor
    """int32 [sequences + 1]: boundaries between the sequences' rows."""
    seqused_k: torch.Tensor
    """int32 [sequences]: tokens that each one sees at its last row."""
    block_table: torch.Tensor
    """int32 [sequences, blocks]."""
    max_q: int
    max_k: int
    """At least the largest of `seqused_k`."""


class VarlenBackend(AttentionBackend):
    """Hands the block tables to the kernel."""

    needs_key_boundaries = False
    """Whether the kernel wants `cu_seq_k`, though the block table makes it pointless. FlashAttention 3 refuses it."""

    def _prepare(self, chunks: Sequence[PackedChunk]) -> None:
        width = max(len(chunk.block_table) for chunk in chunks)
        tables = [[*chunk.block_table, *[0] * (width - len(chunk.block_table))] for chunk in chunks]
        cu_seq_q, seqused_k, block_table = to_device(
            [
                torch.tensor([0, *(chunk.first_row + chunk.length for chunk in chunks)], dtype=torch.int32),
                torch.tensor([chunk.end for chunk in chunks], dtype=torch.int32),
                torch.tensor(tables, dtype=torch.int32),
            ],
            self.device,
        )
        max_q = max(chunk.length for chunk in chunks)
        self.use(Places(self._slots, cu_seq_q, seqused_k, block_table, max_q, max(chunk.end for chunk in chunks)))

    def use(self, places: Places) -> None:
        """Attend by `places` from now on: instead of `prepare`, by who has them on the device already."""
        self._slots = places.slots
        self._places = places
        self._cu_seq_k = _boundaries(places.seqused_k) if self.needs_key_boundaries else None

    def _attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        places = self._places
        output = varlen_attn(
            queries,
            self.cache.keys[layer],
            self.cache.values[layer],
            places.cu_seq_q,
            self._cu_seq_k,
            places.max_q,
            places.max_k,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),  # the kernel does not count the token itself
            enable_gqa=queries.shape[1] != keys.shape[1],
            seqused_k=places.seqused_k,
            block_table=places.block_table,
        )
        assert isinstance(output, torch.Tensor)
        return output


class VarlenBackendWithKeyBoundaries(VarlenBackend):
    """For kernels that want `cu_seq_k` in any case."""

    needs_key_boundaries = True


def _boundaries(lengths: torch.Tensor) -> torch.Tensor:
    """int32 [n] → int32 [n + 1]: 0, and the sums so far."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def find(shape: KVShape, num_heads: int, device: torch.device) -> type[VarlenBackend] | None:
    """The backend for this device and model; None: the kernel can't do it here.

    Args:
        shape: of the cache.
        num_heads: query heads, on this rank.
        device: of the cache.
    """
    if device.type != "cuda" or "block_table" not in inspect.signature(varlen_attn).parameters:
        return None
    return choose(shape, num_heads, device)


@torch.inference_mode()
def choose(shape: KVShape, num_heads: int, device: torch.device) -> type[VarlenBackend] | None:
    """The backend that `varlen_attn` computes right values with on `device`; arguments and result as of `find`."""
    for backend_class in (VarlenBackend, VarlenBackendWithKeyBoundaries):
        try:
            if _works(backend_class, shape, num_heads, device):
                return backend_class
            log.warning("varlen_attn gives wrong values (%s)", backend_class.__name__)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            log.info("varlen_attn does not take this (%s): %s", backend_class.__name__, error)
    log.warning("attention falls back to SDPA, which is slower: varlen_attn can't run this model here")
    return None


def _works(backend_class: type[AttentionBackend], shape: KVShape, num_heads: int, device: torch.device) -> bool:
    """Whether it agrees with `SdpaBackend` on a decoding row with two pages and a prompt chunk with context."""
    small = KVShape(1, shape.num_kv_heads, shape.head_dim, shape.dtype)
    cache = PagedKVCache(small, 4, PAGE_SIZE_MULTIPLE, device)
    draw = torch.Generator().manual_seed(0)

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=draw).to(device, shape.dtype)

    for side in (cache.keys[0], cache.values[0]):
        side.copy_(random(*side.shape))
    chunks = [PackedChunk(0, 1, PAGE_SIZE_MULTIPLE + 40, (2, 0)), PackedChunk(1, 5, 20, (3,))]
    queries, keys, values = (random(6, n, shape.head_dim) for n in (num_heads, shape.num_kv_heads, shape.num_kv_heads))
    outputs = []
    for one in (backend_class(cache, device), SdpaBackend(cache, device)):
        one.prepare(chunks)
        outputs += [one.forward(0, queries, keys, values, shape.head_dim**-0.5, window) for window in (None, 9)]
    differences = [(a - b).abs().max() for a, b in zip(outputs[:2], outputs[2:], strict=True)]
    return all(bool(difference < _TOLERANCE) for difference in differences)
