"""An engine from a checkpoint: the usual way to put its parts together."""

from __future__ import annotations

import logging
import time

import torch

from workers.engine import model_loader
from workers.engine.compiled_forward import CompiledForward
from workers.engine.config import EngineConfig
from workers.engine.embeddings import EmbeddingStore
from workers.engine.engine import Engine
from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.request import Clock
from workers.engine.scheduler import Scheduler
from workers.engine.tensor_parallel import ParallelGroup

log = logging.getLogger(__name__)


def load_engine(config: EngineConfig, *, group: ParallelGroup | None = None, clock: Clock = time.monotonic) -> Engine:
    """Load a model and allocate its KV cache.

    Args:
        config: of model and limits.
        group: the ranks that share the model, of which this is the first; None: it is this process's alone.
        clock: monotonic seconds, for deadlines and stage durations.

    Raises:
        ConfigError: checkpoint or settings cannot work.
    """
    loaded = model_loader.load(config, group)
    kv_cache = KVCacheManager(loaded.num_blocks, loaded.block_size, prefix_caching=config.enable_prefix_caching)
    scheduler = Scheduler(
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=loaded.max_num_batched_tokens,
        max_waiting=config.max_waiting,
        target_step_s=loaded.target_step_s,
    )
    store = EmbeddingStore(config.embedding_store_bytes, config.embedding_unclaimed_ttl_s, clock)
    tokens = loaded.num_blocks * loaded.block_size
    log.info(
        "KV cache: %d tokens in blocks of %d; %.1f requests of the full context of %d tokens fit at once",
        tokens, loaded.block_size, tokens / loaded.info.max_model_len, loaded.info.max_model_len,
    )  # fmt: skip
    engine = Engine(
        loaded.runner, loaded.info, kv_cache, scheduler, store, grammars=loaded.runner.grammars, clock=clock,
        pipelined=_is_pipelined(config, loaded.runner.device, group),
    )  # fmt: skip
    if isinstance(loaded.forward, CompiledForward):
        ended = loaded.forward.ended
        engine.is_disturbed = lambda: not ended.is_set()
    return engine


def _is_pipelined(config: EngineConfig, device: torch.device, group: ParallelGroup | None) -> bool:
    if group is not None:  # the other ranks are told each step's tokens by the host
        return False
    return config.pipelining == "on" or (config.pipelining == "auto" and device.type == "cuda")
