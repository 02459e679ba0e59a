"""An engine whose model is a formula: the edge is fake, scheduler and bookkeeping are real."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from workers.engine.adapter import PlacedImage, PlainPositions
from workers.engine.chunks import ScheduledChunk
from workers.engine.embeddings import EmbeddingStore, ImageEmbeddings
from workers.engine.engine import Engine
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.model_loader import ModelInfo
from workers.engine.sampler import Sampled, SamplingRow
from workers.engine.scheduler import Scheduler

VOCAB = 100
HIDDEN = 4
IMAGE_TOKEN = 99
EOS = 98
CONTEXT = 64
BLOCK_SIZE = 4


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Says how long the sequence is, unless told to fail."""

    compiled_steps = 0

    def __init__(self) -> None:
        self.prompts: dict[str, list[int]] = {}
        self.failure: Exception | None = None
        self.poison: set[int] = set()
        """Prompt tokens that the model fails on, whoever is in the batch with them."""
        self.placing_failure: Exception | None = None
        self.rows: list[SamplingRow] = []
        self.banned: list[set[int]] = []
        """What the rows of the last step must not become."""
        self.chunks: list[ScheduledChunk] = []
        """All that were computed."""
        self.steps: threading.Semaphore | None = None
        """How many steps may run; None: any number. The next one hangs."""
        self.hangs = threading.Event()

    def add(self, request_id: str, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> None:
        if self.placing_failure is not None:
            raise self.placing_failure
        self.prompts[request_id] = list(token_ids)

    def remove(self, request_id: str) -> None:
        self.prompts.pop(request_id, None)

    def prompt_logprobs(self, request_id: str) -> None:
        return None

    def pooled(self, request_id: str) -> tuple[float, ...]:
        return (float(len(self.prompts[request_id])),)

    def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[Sampled]:
        if self.steps is not None and not self.steps.acquire(blocking=False):
            self.hangs.set()
            self.steps.acquire(timeout=20)
            self.hangs.clear()
        if self.failure is not None:
            raise self.failure
        if any(self.poison.intersection(chunk.request.token_ids) for chunk in chunks):
            raise RuntimeError("secret detail")
        assert all(chunk.request.request_id in self.prompts for chunk in chunks)
        assert all(chunk.end <= len(chunk.block_table) * BLOCK_SIZE for chunk in chunks)
        self.rows = list(rows)
        self.chunks += chunks
        self.banned = [set() if row.state is None else set(row.state.banned().tolist()) for row in rows]
        return [Sampled(chunk.request.num_tokens % EOS) for chunk in chunks if chunk.samples]


class FakeImages(PlainPositions):
    """Plain positions, but pictures are welcome."""

    image_token_id = IMAGE_TOKEN

    def check_grid(self, embeddings: ImageEmbeddings) -> None:
        pass


def fake_engine(
    runner: FakeRunner,
    *,
    clock: FakeClock | None = None,
    num_blocks: int = 16,
    max_waiting: int = 8,
    store_bytes: int = 1 << 20,
    images: bool = True,
    caching: bool = True,
    batched_tokens: int = 16,
    pipelined: bool = False,
) -> Engine:
    clock = clock or FakeClock()
    adapter_class = FakeImages if images else PlainPositions
    info = ModelInfo(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        dtype=torch.float32,
        max_model_len=CONTEXT,
        eos_token_ids=frozenset({EOS}),
        adapter=adapter_class(cast("Any", SimpleNamespace())),
    )
    kv_cache = KVCacheManager(num_blocks, block_size=BLOCK_SIZE, prefix_caching=caching)
    scheduler = Scheduler(kv_cache, max_num_seqs=4, max_num_batched_tokens=batched_tokens, max_waiting=max_waiting)
    store = EmbeddingStore(store_bytes, unclaimed_ttl_s=60, clock=clock)
    return Engine(runner, info, kv_cache, scheduler, store, clock=clock, pipelined=pipelined)
