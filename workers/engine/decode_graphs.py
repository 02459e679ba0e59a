"""Decode steps as CUDA graphs: a step of one token a row is replayed instead of launched kernel by kernel.

A graph has fixed shapes and addresses, so there is one for each of a few batch sizes, and a step takes the smallest
that holds it. What differs from step to step goes into static tensors that the graph reads:

    rows [0, n)       the step's own
    rows [n, size)    padding: a sequence of one token in the scratch block, which no request ever has

Steps with prompt chunks run as ever. Where ranks share a model, each has graphs of its share with the collectives in
them: all ranks pad a step to the same size, so that they meet there as they do without graphs.

Only `capture_on_cuda` knows CUDA; the rest is decided on integers.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workers.engine import attention
from workers.engine.attention import slot_mapping
from workers.engine.attention_varlen import Places, VarlenBackend
from workers.engine.forward import LocalForward
from workers.engine.language_model import LanguageModel
from workers.engine.step_inputs import StepInputs

log = logging.getLogger(__name__)

Compute = Callable[[], torch.Tensor]
Capture = Callable[[Compute], Compute]
"""Takes a computation on static tensors and returns what does the same again. The result may be the same tensor, with
other values, each time."""

_WARM_UP_RUNS = 2


@dataclass(frozen=True)
class Layout:
    """What the static tensors of all sizes have in common."""

    num_axes: int
    """Of positions."""
    block_size: int
    table_width: int
    """Blocks of the longest sequence that the model takes."""
    scratch_block: int
    """Takes the keys and values of padding."""


def padded_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes that get a graph: powers of two, and the largest batch there can be."""
    powers = [1 << exponent for exponent in range(max_num_seqs.bit_length())]
    return tuple(sorted({*powers, max_num_seqs}))


def padded_size(num_rows: int, sizes: Sequence[int]) -> int | None:
    """The smallest of `sizes`, which rise, that holds `num_rows` rows; None: there is none."""
    index = bisect.bisect_left(sizes, num_rows)
    return sizes[index] if index < len(sizes) else None


class StaticInputs:
    """The tensors that the graph of one size reads, and their counterparts on the host."""

    def __init__(self, size: int, layout: Layout, device: torch.device) -> None:
        """Allocate them and fill all rows with padding."""
        self._layout = layout
        # Two, by turns: at most two steps are under way, so the last copy from the one that is written is done.
        self._hosts = [_HostInputs(size, layout, is_pinned=device.type == "cuda") for _ in range(2)]
        wide, narrow = self._hosts[0].buffers
        self._device = (torch.zeros_like(wide, device=device), torch.zeros_like(narrow, device=device))
        self.rows = _Rows.over(*self._device, size, layout)
        """On the device."""
        for target, source in zip(self._device, self._hosts[0].buffers, strict=True):
            target.copy_(source)

    def load(self, inputs: StepInputs) -> None:
        """Write a step's rows, and padding behind them. Does not wait for the copies."""
        host = self._hosts[0]
        self._hosts.reverse()
        slots = slot_mapping(inputs.chunks, self._layout.block_size)
        ends = [chunk.end for chunk in inputs.chunks]
        tables = [chunk.block_table[: self._layout.table_width] for chunk in inputs.chunks]
        token_ids = torch.zeros(len(tables), dtype=torch.int64) if inputs.is_unread else inputs.token_ids
        host.write(tables, token_ids, inputs.positions, slots, ends)
        for target, source in zip(self._device, host.buffers, strict=True):
            target.copy_(source, non_blocking=True)
        if inputs.is_unread:
            self.rows.token_ids[: len(tables)] = inputs.token_ids


class _HostInputs:
    """What is copied to the static tensors."""

    def __init__(self, size: int, layout: Layout, *, is_pinned: bool) -> None:
        self._layout = layout
        # One buffer for each type, so that a step takes two copies. Pinned, so that it does not wait for them.
        wide, narrow = (2 + layout.num_axes) * size, (1 + layout.table_width) * size
        self.buffers = (
            torch.zeros(wide, dtype=torch.int64, pin_memory=is_pinned),
            torch.zeros(narrow, dtype=torch.int32, pin_memory=is_pinned),
        )
        self._rows = _Rows.over(*self.buffers, size, layout)
        self._tables: list[tuple[int, ...] | None] = [None] * size
        """What `_rows.block_table` holds: most tables are those of the step before."""
        self.write([], torch.zeros(0), torch.zeros(layout.num_axes, 0), [], [])

    def write(
        self,
        tables: Sequence[tuple[int, ...]],
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: list[int],
        ends: list[int],
    ) -> None:
        """Write so many rows, and padding behind them."""
        count, rows = len(tables), self._rows
        size = len(self._tables)
        padding = size - count
        rows.token_ids[:count] = token_ids
        rows.token_ids[count:] = 0
        rows.positions[:, :count] = positions
        rows.positions[:, count:] = 0
        scratch = self._layout.scratch_block
        rows.slots.copy_(torch.tensor([*slots, *[scratch * self._layout.block_size] * padding]))
        rows.lengths.copy_(torch.tensor([*ends, *[1] * padding]))
        for index in range(size):
            table = tables[index] if index < count else ()
            if self._tables[index] != table:
                rows.block_table[index] = scratch
                rows.block_table[index, : len(table)] = torch.tensor(table, dtype=torch.int32)
                self._tables[index] = table


@dataclass(frozen=True)
class _Rows:
    """Views of the two buffers."""

    token_ids: torch.Tensor
    """int64 [size]."""
    positions: torch.Tensor
    """int64 [axes, size]."""
    slots: torch.Tensor
    """int64 [size]."""
    lengths: torch.Tensor
    """int32 [size]."""
    block_table: torch.Tensor
    """int32 [size, table width]."""

    @classmethod
    def over(cls, wide: torch.Tensor, narrow: torch.Tensor, size: int, layout: Layout) -> _Rows:
        token_ids, positions, slots = torch.split(wide, [size, layout.num_axes * size, size])
        lengths, tables = torch.split(narrow, [size, layout.table_width * size])
        return cls(token_ids, positions.view(layout.num_axes, size), slots, lengths, tables.view(size, -1))


class DecodeGraphs:
    """Implements `Forward`: decode steps by graphs, others by the model itself."""

    def __init__(
        self,
        model: LanguageModel,
        backend: VarlenBackend,
        *,
        sizes: Sequence[int],
        table_width: int,
        scratch_block: int,
        capture: Capture,
    ) -> None:
        """Capture a graph for each size, the largest first, so that the others fit into its memory.

        Args:
            model: runs on the cache of `backend`.
            backend: its cache has the block `scratch_block`.
            sizes: batch sizes, rising.
            table_width: blocks of the longest sequence.
            scratch_block: no request may have it.
            capture: makes the graphs.

        Raises:
            RuntimeError: the model does something that a graph can't hold, or memory does not suffice.
        """
        self._eager = LocalForward(model, backend)
        self._model = model
        self._backend = backend
        self._layout = Layout(model.adapter.num_axes, backend.cache.block_size, table_width, scratch_block)
        self._sizes = tuple(sizes)
        self._graphs = {size: self._graph(size, capture) for size in reversed(self._sizes)}
        self.num_replays = 0

    def hidden(self, inputs: StepInputs) -> torch.Tensor:
        """See `Forward`."""
        size = padded_size(len(inputs.chunks), self._sizes) if inputs.is_decode_only else None
        if size is None:
            return self._eager.hidden(inputs)
        static, replay = self._graphs[size]
        static.load(inputs)
        self.num_replays += 1
        return replay()[: len(inputs.chunks)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Forward`."""
        return self._eager.logits(hidden)

    def release(self) -> None:
        """Destroy the graphs, of which none may be running. Steps are computed without them from then on."""
        self._sizes = ()
        self._graphs.clear()

    @torch.inference_mode()
    def _graph(self, size: int, capture: Capture) -> tuple[StaticInputs, Compute]:
        static = StaticInputs(size, self._layout, self._backend.device)
        rows = static.rows
        places = Places(
            slots=rows.slots,
            cu_seq_q=torch.arange(size + 1, dtype=torch.int32, device=self._backend.device),
            seqused_k=rows.lengths,
            block_table=rows.block_table,
            max_q=1,
            max_k=self._layout.table_width
            * self._layout.block_size,  # fixed in the graph: for the longest there can be
        )
        inputs = StepInputs((), rows.token_ids, rows.positions, (), torch.empty(0, dtype=torch.int64))

        def compute() -> torch.Tensor:
            self._backend.use(places)
            with attention.use_backend(self._backend):
                return self._model.hidden(self._model.embed(inputs), inputs.positions)

        return static, capture(compute)


def agreed(capture: Capture, agree_on_smallest: Callable[[int], int]) -> Capture:
    """Captures where ranks share a model: all of them get a graph, or all raise RuntimeError.

    Capturing computes nothing, so a rank that fails at it keeps nobody waiting. One that fails before, in the runs that
    warm up, leaves the others in a collective, as it does in any step.

    Args:
        capture: what this rank does alone.
        agree_on_smallest: the smallest of all ranks' values. Every rank calls it.
    """

    def together(compute: Compute) -> Compute:
        replay, failure = None, None
        try:
            replay = capture(compute)
        except RuntimeError as error:
            failure = error
        if not agree_on_smallest(int(replay is not None)) or replay is None:
            raise RuntimeError(f"a rank can't capture them ({failure or 'not this one'})") from failure
        return replay

    return together


def capture_on_cuda(device: torch.device, *, is_shared: bool = False) -> Capture:
    """Captures CUDA graphs that share one pool of memory: the result of a replay lasts until the next one, of any.

    Args:
        device: where the tensors are.
        is_shared: with other ranks. What is captured then has collectives of NCCL, whose communicator the runs that
            warm up have made, and torch's watchdog for it, a thread, may look at events of theirs meanwhile.
    """
    error_mode = "thread_local" if is_shared else "global"
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(compute: Compute) -> Compute:
        # Libraries set themselves up on their first calls, which a graph must not contain.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=error_mode):
            result = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture
