"""One model over several processes, each with its share of the heads: tensor parallelism by transformers' own plan.

    rank 0   engine, scheduler, sampling ── LeadingForward ── LocalForward ─┐
                                              │ orders                      ├─ all-reduce in each layer
    rank i                                  follow() ──────── LocalForward ─┘

Rank 0 is the worker that the cluster knows. The others know no request: an order carries everything that a step takes,
so there is no state to keep in step beside the KV cache, whose blocks mean the same on every rank.

Ranks meet inside the collectives of a forward call. One that fails leaves the others there, so a failure on any rank
is the end of all.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed
from transformers import PretrainedConfig

from epd.errors import ConfigError
from workers.engine.forward import Forward
from workers.engine.step_inputs import StepInputs

Send = Callable[[bytes], None]
"""Hands an order to every other rank, in order and whole. Raises OSError when one of them is gone."""

_START_TIMEOUT = timedelta(hours=1)
"""For the slowest rank to read its weights. A rank that dies is noticed by its process, not by this."""

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelGroup:
    """This process's place among the ranks."""

    rank: int
    size: int
    device: torch.device
    send: Send | None = None
    """Rank 0 alone has it."""
    before_leaving: list[Callable[[], None]] = field(default_factory=list)
    """What lets go of graphs with collectives in them: NCCL ends no group while one is left (`leave` would hang)."""

    def agree_on_smallest(self, value: int) -> int:
        """The smallest of all ranks' values. Every rank must call it."""
        shared = torch.tensor([value], device=self.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN)
        return int(shared)


def join(rank: int, size: int, rendezvous: Path, device_name: str, send: Send | None = None) -> ParallelGroup:
    """Meet the other ranks; returns when all are there.

    Args:
        rank: of this process.
        size: number of ranks, on this host.
        rendezvous: a file that all of them name, new, in a folder that nobody else may read.
        device_name: `cpu`, `cuda` or `auto`. Rank i takes GPU i.
        send: for rank 0.

    Raises:
        ConfigError: not so many GPUs, or what transformers needs for it is not installed.
    """
    device = _device_of(rank, size, device_name)
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("--tp needs the accelerate package: pip install 'epd[tp]'")
    os.environ["LOCAL_RANK"] = str(rank)  # transformers picks the device by it
    if sys.platform == "linux":  # all ranks are here: nobody else should see their sockets
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.FileStore(str(rendezvous), size),  # type: ignore[attr-defined]  # documented, not in __all__
        rank=rank,
        world_size=size,
        timeout=_START_TIMEOUT,
        **options,
    )
    return ParallelGroup(rank, size, device, send)


def leave(group: ParallelGroup | None) -> None:
    """Undo `join`, if it was called. Only when no collective is under way.

    Args:
        group: what `join` returned; None: it failed, or was not called.
    """
    for release in () if group is None else group.before_leaving:
        release()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device_of(rank: int, size: int, name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name == "cpu":
        if has_cuda:  # transformers would take the GPUs all the same
            raise ConfigError("--tp on the CPU of a machine with GPUs: hide them with CUDA_VISIBLE_DEVICES=''")
        return torch.device("cpu")
    if torch.cuda.device_count() < size:
        raise ConfigError(f"--tp {size} needs {size} GPUs, torch finds {torch.cuda.device_count()}")
    return torch.device(name, rank)


def check_model(config: PretrainedConfig, num_ranks: int) -> None:
    """Refuse a model whose heads can't be shared out.

    Args:
        config: of the whole model.
        num_ranks: that are to share it.

    Raises:
        ConfigError: says why, and what would do.
    """
    text_config = config.get_text_config()
    plan: dict[str, str] = text_config.base_model_tp_plan or {}
    name = (config.architectures or [config.model_type])[0]
    if not any(module.endswith(".k_proj") and style == "colwise" for module, style in plan.items()):
        raise ConfigError(f"--tp: transformers has no plan for sharing the attention heads of {name}")
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    if heads % num_ranks or kv_heads % num_ranks:
        fitting = [n for n in range(2, kv_heads + 1) if heads % n == kv_heads % n == 0]
        would_do = f"; {', '.join(map(str, fitting))} would do" if fitting else ""
        raise ConfigError(
            f"--tp {num_ranks}: {heads} attention heads and {kv_heads} key-value heads can't be shared evenly{would_do}"
        )


# -- orders ------------------------------------------------------------------------------------------------------------


class ComputeHidden(msgspec.Struct, tag=True):
    """Call `Forward.hidden`."""

    inputs: StepInputs


class ComputeLogits(msgspec.Struct, tag=True):
    """Call `Forward.logits` on `num_rows` rows, which rank 0 broadcasts next."""

    num_rows: int


Order = ComputeHidden | ComputeLogits


class _Tensor(msgspec.Struct, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def _encode_tensor(value: Any) -> _Tensor:
    if not isinstance(value, torch.Tensor):
        raise NotImplementedError(f"{type(value).__name__} in an order")
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16, bytes it has
    return _Tensor(str(value.dtype).removeprefix("torch."), tuple(value.shape), data)


def _decode_tensor(kind: type, value: Any) -> Any:
    if kind is not torch.Tensor:
        raise NotImplementedError(f"{kind.__name__} in an order")
    tensor = msgspec.convert(value, _Tensor)
    dtype = getattr(torch, tensor.dtype)
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).view(tensor.shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_tensor)
_decoder = msgspec.msgpack.Decoder(ComputeHidden | ComputeLogits, dec_hook=_decode_tensor)


# -- rank 0 ------------------------------------------------------------------------------------------------------------


class LeadingForward:
    """Has the other ranks compute what this one computes, at the same time."""

    def __init__(self, local: Forward, send: Send) -> None:
        """Run this rank's share by `local`; tell the others by `send`."""
        self._local = local
        self._send = send
        self._is_broken = False

    def hidden(self, inputs: StepInputs) -> torch.Tensor:
        """See `Forward`."""
        return self._together(ComputeHidden(inputs), lambda: self._local.hidden(inputs))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Forward`."""

        def compute() -> torch.Tensor:
            torch.distributed.broadcast(hidden, src=0)
            return self._local.logits(hidden)

        return self._together(ComputeLogits(hidden.shape[0]), compute)

    def _together(self, order: Order, compute: Callable[[], T]) -> T:
        if self._is_broken:
            raise RuntimeError("a rank failed in an earlier step; the ranks no longer agree")
        try:
            self._send(_encoder.encode(order))
            return compute()
        except BaseException:  # wherever it stopped, the other ranks are elsewhere
            self._is_broken = True
            raise


# -- the others --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def follow(
    orders: Iterable[bytes], local: Forward, group: ParallelGroup, *, hidden_size: int, dtype: torch.dtype
) -> None:
    """Carry out orders until there are no more.

    Args:
        orders: from rank 0's `send`.
        local: computes this rank's share.
        group: this rank's.
        hidden_size: of the model.
        dtype: of its hidden states.

    Raises:
        Exception: the model failed. The group is of no use any more.
    """
    for frame in orders:
        match _decoder.decode(frame):
            case ComputeHidden(inputs):
                local.hidden(inputs)
            case ComputeLogits(num_rows):
                hidden = torch.empty(num_rows, hidden_size, dtype=dtype, device=group.device)
                torch.distributed.broadcast(hidden, src=0)
                local.logits(hidden)
