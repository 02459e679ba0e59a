"""Checkpoints whose weights are quantised: which kinds load, what each needs, and where it runs.

transformers' quantizers do the loading; they are asked for by `quantization_config` in the checkpoint's config.json.
Here is checked beforehand what they would trip over in the middle of it, so that the error names method and remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig

from epd.errors import ConfigError

_EXTRA = "pip install 'epd[quantization]'"


@dataclass(frozen=True)
class Method:
    """One kind of quantisation."""

    name: str
    """For people."""
    packages: tuple[str, ...]
    """Modules that its quantizer imports."""
    install: str = _EXTRA
    """The command that brings them."""
    runs_on_cpu: bool = True
    cpu_dtype: torch.dtype | None = None
    """What it is turned into on a CPU, which can't compute in its own; None: stays as it is."""


METHODS = {
    "torchao": Method("torchao", ("torchao",)),
    "bitsandbytes": Method("bitsandbytes", ("accelerate", "bitsandbytes")),
    "compressed-tensors": Method("compressed-tensors", ("compressed_tensors",)),
    "fp8": Method("FP8", ("accelerate",), cpu_dtype=torch.bfloat16),
    "gptq": Method("GPTQ", ("optimum", "gptqmodel"), "pip install optimum gptqmodel", runs_on_cpu=False),
    "awq": Method("AWQ", ("accelerate", "gptqmodel"), "pip install accelerate gptqmodel", runs_on_cpu=False),
}
"""`quant_method` in the checkpoint → what is known of it."""


def method_of(config: PretrainedConfig) -> str | None:
    """The checkpoint's `quant_method`; None: its weights are plain.

    Raises:
        ConfigError: there is a `quantization_config` without one.
    """
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method")
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        return "bitsandbytes"  # its early checkpoints leave the name out
    if method is None:
        raise ConfigError("quantization_config in config.json names no quant_method")
    return str(getattr(method, "value", method))


def check(
    config: PretrainedConfig,
    dtype: str | torch.dtype,
    device: torch.device,
    *,
    num_ranks: int = 1,
    is_installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
) -> None:
    """Refuse a quantised checkpoint that can't be loaded here. One with plain weights passes.

    Args:
        config: of the checkpoint.
        dtype: that was asked for; "auto" for the checkpoint's own.
        device: where the weights go.
        num_ranks: processes that share the model.
        is_installed: tells of a module whether it could be imported.

    Raises:
        ConfigError: names the method, and what would help.
    """
    found = method_of(config)
    if found is None:
        return
    method = METHODS.get(found)
    if method is None:
        raise ConfigError(f"weights quantised by {found} are not covered; {', '.join(METHODS)} are")
    if device.type == "cpu" and not method.runs_on_cpu:
        raise ConfigError(
            f"this checkpoint is quantised by {method.name}, which needs a GPU, and --device is cpu. "
            "Start it on a CUDA device, or use the checkpoint that it was made from"
        )
    if num_ranks > 1:
        raise ConfigError(f"this checkpoint is quantised by {method.name}, which --tp can't split; leave out --tp")
    missing = [package for package in method.packages if not is_installed(package)]
    if missing:
        raise ConfigError(
            f"this checkpoint is quantised by {method.name}, which needs {' and '.join(missing)}: {method.install}"
        )
    if device.type == "cpu" and method.cpu_dtype and dtype not in ("auto", "bfloat16", method.cpu_dtype):
        raise ConfigError(
            f"this checkpoint is quantised by {method.name}, which a CPU computes in bfloat16: set --dtype bfloat16"
        )


def is_plain(config: PretrainedConfig, device: torch.device) -> bool:
    """Whether all weights of the loaded model are ordinary tensors, that others may lay out anew."""
    found = method_of(config)
    return found is None or (device.type == "cpu" and METHODS[found].cpu_dtype is not None)


def placement(config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put the weights of a quantised checkpoint on a GPU as they are read.

    Some quantizers pack their weights for the device while they load, and can't be moved afterwards.
    """
    if method_of(config) is None or device.type == "cpu":
        return {}
    return {"device_map": {"": str(device)}}
