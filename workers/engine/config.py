"""Settings of the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from epd.errors import ConfigError
from epd.types import WorkerTask


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What can be chosen; None means that the engine decides from model and device."""

    model: str
    """Checkpoint folder."""
    task: WorkerTask = WorkerTask.GENERATE
    """What the model is loaded for."""
    load_format: str = "auto"
    """"dummy": random weights, and no weight files needed."""
    dtype: str = "auto"
    """Of weights, activations and KV cache, such as `bfloat16`; "auto": the checkpoint's."""
    quantization: str = "none"
    """"int8": round an ordinary checkpoint's linear layers to eight bits at start, on a CPU."""
    device: str = "auto"
    """Such as `cpu` or `cuda:1`; "auto": a GPU if there is one."""
    max_num_seqs: int = 64
    """Requests that run at once."""
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step. More is faster for prompts, less lets running answers stutter less.
    None: 512 on a CPU, 4096 on a GPU."""
    target_step_ms: float | None = None
    """Milliseconds that a step should take while answers run: prompts beside them go in chunks that keep to it.
    0: no limit. None: 50 on a CPU, 0 on a GPU."""
    max_model_len: int | None = None
    """Context in tokens, prompt and answer; None: the model's, or what fits into the KV cache."""
    block_size: int | None = None
    """Tokens per KV block. None: 16 on a CPU, 256 on a GPU, where the kernel wants that."""
    kv_cache_memory_bytes: int | None = None
    """For the KV cache. None: on a GPU by `gpu_memory_utilization`, else a quarter of free memory up to 1 GiB."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights, activations and KV cache together."""
    enable_prefix_caching: bool = True
    """Keep what was computed in free KV blocks, and use it again for requests that begin with the same content."""
    compile: str = "auto"
    """Whether torch compiles steps on a CPU, in the background. "auto": in 16 bits, if there is a C++ compiler and the
    model is large enough to gain; "on": in float32 and for small models too; "off"."""
    enable_cuda_graphs: bool = True
    """On a GPU, replay decode steps as CUDA graphs. Capturing them takes some seconds and some memory at start."""
    pipelining: str = "auto"
    """Whether a step is launched before the tokens of the one before it are read. "auto": on a GPU; "on": on a CPU too,
    where it gains nothing; "off". Never with tensor parallelism."""
    embedding_store_bytes: int = 1 << 30
    """For image embeddings in main memory: those in use, those early, and a cache of the rest."""
    embedding_unclaimed_ttl_s: float = 120.0
    """How long embeddings wait for a request that needs them before their room may be taken."""
    max_waiting: int = 1024
    """Requests that wait, for embeddings or for their turn; one more is refused as overloaded."""

    def __post_init__(self) -> None:
        """Refuse what cannot work; raises ConfigError."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.quantization not in ("none", "int8"):
            raise ConfigError(f"quantization must be none or int8, got {self.quantization!r}")
        if self.compile not in ("auto", "on", "off"):
            raise ConfigError(f"compile must be auto, on or off, got {self.compile!r}")
        if self.pipelining not in ("auto", "on", "off"):
            raise ConfigError(f"pipelining must be auto, on or off, got {self.pipelining!r}")
        if self.target_step_ms is not None and not 0 <= self.target_step_ms < math.inf:
            raise ConfigError(f"target_step_ms must be a finite number of at least 0, got {self.target_step_ms}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): a step has room for one token of each"
            )
