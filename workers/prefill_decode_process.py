"""A prefill-decode worker as a process: the ranks of its model, engine, service and runtime put together."""

from __future__ import annotations

import asyncio

import torch

from epd import collector
from epd.checkpoint import fingerprint
from epd.config import PrefillDecodeConfig
from epd.types import WorkerRole, WorkerTask
from workers.core_turns import CoreTurns
from workers.engine.assembly import load_engine
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.prefill_decode import PrefillDecodeService
from workers.ranks import Ranks
from workers.runtime import WorkerRuntime


async def run_prefill_decode(config: PrefillDecodeConfig) -> int:
    """Run a prefill-decode worker until SIGTERM. Returns the exit code: 1 when the engine failed.

    Raises:
        ConfigError: checkpoint, address or settings cannot work.
    """
    collector.keep()
    settings = _engine_config(config)
    ranks = Ranks(config.tp)
    try:
        threads = torch.get_num_threads()
        group = ranks.start(settings, name=config.name, log_level=config.log_level, threads=threads)
        return await _run(config, load_engine(settings, group=group), ranks)
    finally:
        ranks.stop()


async def _run(config: PrefillDecodeConfig, engine: Engine, ranks: Ranks) -> int:
    runtime = WorkerRuntime(
        config,
        role=WorkerRole.PREFILL_DECODE,
        model=fingerprint(config.model),
        dtype=str(engine.info.dtype).removeprefix("torch."),
        max_model_len=engine.info.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_requests=config.max_num_seqs + config.max_waiting,
        task=engine.info.task,
    )
    crashed = asyncio.Event()
    service = PrefillDecodeService(
        engine,
        runtime.send,
        max_requests=config.max_num_seqs + config.max_waiting,
        crashed=crashed,
        turns=CoreTurns(None if _on_gpu(config) else config.share_cores),
    )
    loop = asyncio.get_running_loop()
    ranks.died = lambda reason: loop.call_soon_threadsafe(service.fail, reason)
    watch = asyncio.create_task(_shut_down_on_crash(crashed, runtime))
    try:
        await service.warm_up()
        collector.settle()
        return await runtime.run(service)
    finally:
        watch.cancel()


async def _shut_down_on_crash(crashed: asyncio.Event, runtime: WorkerRuntime) -> None:
    await crashed.wait()
    runtime.shut_down(exit_code=1)


def _on_gpu(config: PrefillDecodeConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _engine_config(config: PrefillDecodeConfig) -> EngineConfig:
    return EngineConfig(
        model=str(config.model),
        task=WorkerTask(config.task),
        load_format=config.load_format,
        device=config.device,
        dtype=config.dtype,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        target_step_ms=config.target_step_ms,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_cuda_graphs=config.enable_cuda_graphs,
        pipelining=config.pipelining,
        compile=config.compile,
        quantization=config.quantization,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        embedding_store_bytes=config.embedding_store_bytes,
        max_waiting=config.max_waiting,
    )
