"""A first step for nobody: pays for lazy set-up at start, and proves that the model works."""

from __future__ import annotations

from epd.types import Pooling, PoolingKind, SamplingParams, WorkerTask
from workers.engine.chunks import ScheduledChunk
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.model_runner import Runner
from workers.engine.request import EngineRequest
from workers.engine.sampler import SamplingRow

_ID = "(warm-up)"
_STEPS = (
    (0, 2, SamplingParams(top_p=0.9)),
    (2, 1, SamplingParams(temperature=1.0)),
    (3, 1, SamplingParams(temperature=0.0)),
)
"""Of each step: first token, tokens, and how the next one is chosen; each of these ways needs something else."""
_POOLING = {
    WorkerTask.GENERATE: None,
    WorkerTask.SCORE: Pooling(PoolingKind.SCORE),
    WorkerTask.EMBED: Pooling(PoolingKind.MEAN),
}


def warm_up(runner: Runner, kv_cache: KVCacheManager, task: WorkerTask) -> None:
    """Compute a prompt, and tokens if the model gives any. Nothing of it stays.

    Raises:
        Exception: whatever the model raises.
    """
    pooling = _POOLING[task]
    request = EngineRequest(_ID, [0, 0], SamplingParams(), pooling=pooling)
    if not kv_cache.grow(_ID, 4):
        return  # all blocks hold requests, so it is warm
    try:
        runner.add(_ID, request.token_ids, [])
        table = tuple(kv_cache.block_table(_ID))
        for start, length, sampling in _STEPS[: 1 if pooling else None]:
            chunk = ScheduledChunk(request, start, length, table, is_last=True)
            rows = [SamplingRow(sampling, request.num_tokens)] if chunk.samples else []
            request.token_ids += [sampled.token_id for sampled in runner.run([chunk], rows)]
    finally:
        runner.remove(_ID)
        kv_cache.free(_ID)
