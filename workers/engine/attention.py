"""Attention over the paged KV cache, plugged into transformers' models through their attention interface.

A step's tokens go through the model as one packed row [1, tokens]. Everything but attention treats tokens one by one,
so only the function registered here needs to know which tokens belong together. It finds that in the active backend,
set by the model runner around the forward call, and not in keyword arguments, which not every model hands through.

transformers 5.23 builds no mask at all for an attention implementation that has no mask function registered, which is
what we want, so none is registered; a mask that arrives all the same is refused rather than ignored.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import msgspec
import torch
from transformers import AttentionInterface

from workers.engine.paged_kv import PagedKVCache
from workers.engine.transfer import to_device

ATTENTION_NAME = "epd_paged"

_active: ContextVar[AttentionBackend] = ContextVar("epd_attention_backend")


class PackedChunk(msgspec.Struct, frozen=True):
    """Rows [first_row, first_row + length) of the packed batch are tokens [start, start + length) of one sequence."""

    first_row: int
    length: int
    start: int
    block_table: tuple[int, ...]
    """Covers at least tokens [0, start + length)."""
    bidirectional: tuple[tuple[int, int], ...] = ()
    """Half-open token ranges within [start, start + length) whose tokens also see what follows them in their range.
    `SdpaBackend` alone heeds them."""

    @property
    def end(self) -> int:
        """Tokens of the sequence that the last row sees, itself included."""
        return self.start + self.length

    @property
    def rows(self) -> slice:
        """The chunk's rows in the packed batch."""
        return slice(self.first_row, self.first_row + self.length)


class AttentionBackend(ABC):
    """One way to compute attention over a `PagedKVCache`."""

    def __init__(self, cache: PagedKVCache, device: torch.device) -> None:
        """Work on `cache`, whose tensors are on `device`."""
        self.cache = cache
        self.device = device
        self._slots = torch.empty(0, dtype=torch.int64)

    def prepare(self, chunks: Sequence[PackedChunk]) -> None:
        """Compute what all layers of the next forward call share. Chunks of one token come first, short before long."""
        slots = torch.tensor(slot_mapping(chunks, self.cache.block_size), dtype=torch.int64)
        (self._slots,) = to_device([slots], self.device)
        self._prepare(chunks)

    def forward(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """Store the new keys and values of a layer and attend over the sequences so far.

        Args:
            layer: index of the layer.
            queries: [tokens, heads, head dim].
            keys: [tokens, kv heads, head dim].
            values: as `keys`.
            scale: factor on the scores.
            window: a token sees so many tokens up to itself, itself included; None: all.

        Returns:
            [tokens, heads, head dim].
        """
        self.cache.write(layer, self._slots, keys, values)
        return self._attend(layer, queries, keys, values, scale, window)

    @abstractmethod
    def _prepare(self, chunks: Sequence[PackedChunk]) -> None: ...

    @abstractmethod
    def _attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor: ...


def slot_mapping(chunks: Sequence[PackedChunk], block_size: int) -> list[int]:
    """The cache slot of each row of the packed batch."""
    return [
        chunk.block_table[index // block_size] * block_size + index % block_size
        for chunk in chunks
        for index in range(chunk.start, chunk.end)
    ]


@contextmanager
def use_backend(backend: AttentionBackend) -> Iterator[None]:
    """Models with our attention use `backend` inside, in this thread or task."""
    token = _active.set(backend)
    try:
        yield
    finally:
        _active.reset(token)


def register() -> None:
    """Make `ATTENTION_NAME` known to transformers. Doing it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, _paged_attention_forward)


@functools.cache
def register_compiled() -> Any:
    """Make attention one operator for torch's compiler, which then neither looks into it nor breaks its graph there.

    The operator also writes to the cache, which the compiler is not told: the cache is none of the graph's tensors, and
    what orders these writes is that each layer's input depends on the output of the one before it.
    """
    library: Any = torch.library.Library("epd_attention", "DEF")  # type: ignore[no-untyped-call]
    library.define("paged(Tensor queries, Tensor keys, Tensor values, int layer, float scale, int? window) -> Tensor")
    library.impl("paged", lambda *arguments: _attend_in_graph(*arguments), "CompositeExplicitAutograd")
    torch.library.register_fake("epd_attention::paged", lambda queries, *_: torch.empty_like(queries), lib=library)
    return library


def _attend_in_graph(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, scale: float, window: int | None
) -> torch.Tensor:
    return _active.get().forward(layer, queries, keys, values, scale, window)


_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def _paged_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What a model calls per layer: query [1, heads, tokens, head dim] → [1, tokens, heads, head dim]."""
    wanted = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if wanted or attention_mask is not None:
        raise NotImplementedError(f"paged attention has no {', '.join(wanted) or 'attention mask'}")
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = scaling if scaling is not None else float(query.shape[-1] ** -0.5)
    if torch.compiler.is_compiling():
        attend: Any = torch.ops.epd_attention.paged
        # Laid out as the operator's fake says: its output has the strides of its input.
        return attend(queries.contiguous(), keys, values, module.layer_idx, scale, sliding_window)[None], None
    output = _active.get().forward(module.layer_idx, queries, keys, values, scale, sliding_window)
    return output[None], None
