"""From a checkpoint folder to a runner with its KV cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from epd.errors import ConfigError
from epd.types import WorkerTask
from workers import model_parts, model_tasks, quantization
from workers.engine import attention, attention_cpu, attention_varlen, coverage, int8_linear, packed_linear
from workers.engine.adapter import PlainPositions, make_adapter
from workers.engine.attention import AttentionBackend
from workers.engine.attention_sdpa import SdpaBackend
from workers.engine.attention_varlen import VarlenBackend
from workers.engine.compiled_forward import CompiledForward
from workers.engine.config import EngineConfig
from workers.engine.decode_graphs import Capture, DecodeGraphs, agreed, capture_on_cuda, padded_sizes
from workers.engine.forward import Forward, LocalForward
from workers.engine.grammar import GrammarCompiler
from workers.engine.language_model import LanguageModel
from workers.engine.model_runner import ModelRunner
from workers.engine.paged_kv import KVShape, PagedKVCache, num_blocks_for
from workers.engine.tensor_parallel import LeadingForward, ParallelGroup

log = logging.getLogger(__name__)

_WORTH_COMPILING = 50_000_000
"""Parameters. A smaller model gains a millisecond a step, but compiling takes as long as for a large one."""


@dataclass(frozen=True)
class ModelInfo:
    """What the engine must know of a model to check requests and embeddings."""

    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    max_model_len: int
    eos_token_ids: frozenset[int]
    adapter: PlainPositions
    task: WorkerTask = WorkerTask.GENERATE


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and the sizes that were decided on the way."""

    runner: ModelRunner
    forward: Forward
    """What `runner` runs steps by."""
    model: LanguageModel
    info: ModelInfo
    num_blocks: int
    block_size: int
    max_num_batched_tokens: int
    target_step_s: float
    """See `EngineConfig.target_step_ms`."""


def load(config: EngineConfig, group: ParallelGroup | None = None) -> LoadedModel:
    """Load the language part and allocate the KV cache.

    Args:
        config: the same on every rank.
        group: the ranks that share the model, all of which make this call; None: it is this process's alone.

    Raises:
        ConfigError: the checkpoint is not covered or not complete, or memory does not suffice.
    """
    device = _device(config.device) if group is None else group.device
    num_ranks = 1 if group is None else group.size
    attention.register()
    checkpoint = model_parts.load_config(config.model)
    coverage.check_class(model_tasks.model_class(checkpoint, config.task), checkpoint)
    model = model_parts.load_language_part(
        config.model,
        _dtype(config.dtype),
        device,
        attn_implementation=attention.ATTENTION_NAME,
        task=config.task,
        load_format=config.load_format,
        num_ranks=num_ranks,
    )
    text_config = model.config.get_text_config()
    on_gpu = device.type == "cuda"
    batched_tokens = config.max_num_batched_tokens or max(4096 if on_gpu else 512, config.max_num_seqs)
    adapter = make_adapter(model, model.config)
    context = config.max_model_len or text_config.max_position_embeddings
    coverage.check_context(model.config, context)
    coverage.fix_rotation(model)
    shape = KVShape.of(text_config, model.dtype).share_of(num_ranks)
    backend_class = _backend_class(shape, text_config.num_attention_heads // num_ranks, device, adapter)
    block_size = _block_size(config.block_size, issubclass(backend_class, VarlenBackend))
    coverage.check_layers(model, adapter, shape)
    is_plain = num_ranks == 1 and quantization.is_plain(checkpoint, device)
    if config.quantization == "int8":
        _check_int8(is_plain, device)
        int8_linear.convert(model)
    elif is_plain and packed_linear.is_available(model.dtype, device):
        packed_linear.pack(model)
    num_blocks = num_blocks_for(
        shape,
        block_size,
        device,
        memory_bytes=config.kv_cache_memory_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        reserved_bytes=_activation_bytes(text_config, model.dtype, batched_tokens, config.max_num_seqs),
        max_useful_tokens=config.max_num_seqs * context,
    )
    if group is not None:
        num_blocks = group.agree_on_smallest(num_blocks)
    info = _model_info(model, config, text_config, _fitting_context(config, context, num_blocks * block_size))
    # One block more than requests can have, for the padding of graphs.
    backend = backend_class(PagedKVCache(shape, num_blocks + 1, block_size, device), device)
    language_model = LanguageModel(model, info.adapter)
    forward = _forward(language_model, backend, config, info.max_model_len, group)
    if isinstance(forward, CompiledForward):
        forward.start()
    runner = ModelRunner(forward, info.adapter, device, _grammars(config, info))
    target_step_ms = (0 if on_gpu else 50) if config.target_step_ms is None else config.target_step_ms
    return LoadedModel(
        runner, forward, language_model, info, num_blocks, block_size, batched_tokens, target_step_ms / 1000
    )


def _forward(
    model: LanguageModel, backend: AttentionBackend, config: EngineConfig, context: int, group: ParallelGroup | None
) -> Forward:
    """What runs steps; the last block of the backend's cache is nobody's."""
    if group is None and _shall_compile(config, model, backend):
        return CompiledForward(model, backend, config)
    forward = _graphs(model, backend, config, context, group) or LocalForward(model, backend)
    return forward if group is None or group.send is None else LeadingForward(forward, group.send)


def _graphs(
    model: LanguageModel, backend: AttentionBackend, config: EngineConfig, context: int, group: ParallelGroup | None
) -> DecodeGraphs | None:
    """Decode steps as graphs, where they can be; of ranks that share a model, all have them or none has."""
    capture = _capture(config, backend.device, group)
    if capture is None or not isinstance(backend, VarlenBackend):
        return None
    try:
        graphs = DecodeGraphs(
            model,
            backend,
            sizes=padded_sizes(config.max_num_seqs),
            table_width=-(-context // backend.cache.block_size),
            scratch_block=backend.cache.num_blocks - 1,
            capture=capture if group is None else agreed(capture, group.agree_on_smallest),
        )
    except RuntimeError as error:  # what a family does in its forward call is known only by trying
        log.warning("decode steps run without CUDA graphs: %s", error)
        return None
    if group is not None:
        group.before_leaving.append(graphs.release)
    return graphs


def _check_int8(is_plain: bool, device: torch.device) -> None:
    if not is_plain:
        raise ConfigError("quantization int8 takes a checkpoint of plain weights in one process, on a CPU")
    if not int8_linear.is_available(device):
        raise ConfigError("quantization int8 needs a CPU that multiplies integers (AVX512-VNNI); leave it out here")


def _shall_compile(config: EngineConfig, model: LanguageModel, backend: AttentionBackend) -> bool:
    if (
        config.compile == "off"
        or backend.device.type != "cpu"
        or not quantization.is_plain(model_parts.load_config(config.model), backend.device)
    ):
        return False
    if not isinstance(backend, attention_cpu.CpuBackend):
        log.info("steps are not compiled: that needs a C++ compiler (g++ or clang++)")
        return False
    is_packed = packed_linear.is_available(model.embedding_weight.dtype, backend.device)
    return config.compile == "on" or (is_packed and model.num_parameters >= _WORTH_COMPILING)


def _capture(config: EngineConfig, device: torch.device, group: ParallelGroup | None) -> Capture | None:
    if device.type != "cuda" or not config.enable_cuda_graphs:
        return None
    return capture_on_cuda(device, is_shared=group is not None)


def _backend_class(
    shape: KVShape, num_heads: int, device: torch.device, adapter: PlainPositions
) -> type[AttentionBackend]:
    """The fastest one that can do what the model needs: the kernel for CUDA knows no tokens that see later ones."""
    if device.type == "cpu" and attention_cpu.is_available(shape.dtype):
        return attention_cpu.CpuBackend
    if adapter.bidirectional_images:
        return SdpaBackend
    return attention_varlen.find(shape, num_heads, device) or SdpaBackend


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}") from error


def _block_size(chosen: int | None, has_paged_kernel: bool) -> int:
    if not has_paged_kernel:
        return chosen or 16
    multiple = attention_varlen.PAGE_SIZE_MULTIPLE
    if chosen is not None and chosen % multiple:
        raise ConfigError(f"block_size {chosen}: on this GPU it must be a multiple of {multiple}")
    return chosen or multiple


def _dtype(name: str) -> str | torch.dtype:
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"unknown dtype {name!r}; try bfloat16, float16 or float32")
    return dtype


def _fitting_context(config: EngineConfig, context: int, cache_tokens: int) -> int:
    """The context that a lone request can really use: one that outgrows the cache could never go on."""
    if context <= cache_tokens:
        return context
    if config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len is {context}, but the KV cache has room for {cache_tokens} tokens. "
            "Raise kv_cache_memory_bytes or gpu_memory_utilization, or lower max_model_len."
        )
    log.warning("context reduced from %d to %d tokens: more do not fit into the KV cache", context, cache_tokens)
    return cache_tokens


def _activation_bytes(text_config: Any, dtype: torch.dtype, batched_tokens: int, num_seqs: int) -> int:
    """Upper estimate of a step's temporaries: the widest layer, and logits with what sampling makes of them."""
    width = 4 * text_config.intermediate_size + 16 * text_config.hidden_size
    sampling_bytes_per_logit = 40  # float32 copies, sorted scores and int64 noise
    logits = num_seqs * int(text_config.vocab_size)
    return batched_tokens * int(width) * dtype.itemsize + logits * sampling_bytes_per_logit


def _model_info(model: PreTrainedModel, config: EngineConfig, text_config: Any, context: int) -> ModelInfo:
    return ModelInfo(
        vocab_size=text_config.vocab_size,
        hidden_size=text_config.hidden_size,
        dtype=model.dtype,
        max_model_len=context,
        eos_token_ids=_eos_token_ids(config.model, text_config),
        adapter=make_adapter(model, model.config),
        task=config.task,
    )


def _grammars(config: EngineConfig, info: ModelInfo) -> GrammarCompiler | None:
    tokenizer = Path(config.model) / "tokenizer.json"
    if info.task is not WorkerTask.GENERATE or not tokenizer.is_file():
        return None
    try:
        return GrammarCompiler(tokenizer, info.vocab_size, info.eos_token_ids, torch.get_num_threads())
    except ValueError as error:
        log.warning("requests with a grammar will be refused: %s can't be used: %s", tokenizer, error)
        return None


def _eos_token_ids(path: str, text_config: Any) -> frozenset[int]:
    """From the generation config, which lists all of them, or else the one in the model config."""
    try:
        eos = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except OSError:  # optional in a checkpoint
        eos = None
    if eos is None:
        eos = text_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
