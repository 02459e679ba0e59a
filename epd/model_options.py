"""How models are run, and which pictures they may be shown: fields that parts of a cluster share with `epd up`.

`epd up` hands each on to the parts that have it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from epd.errors import ConfigError
from epd.options import option

MOST_TOKENS = 1 << 24
"""Of a context, a step or a block: far beyond what models have."""
MOST_SEQUENCES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Of all workers."""

    device: str = option("auto", "where the model runs; auto: cuda when there is one", choices=("auto", "cpu", "cuda"))
    load_format: str = option(
        "auto",
        "dummy: random weights, for measurements; no weight files needed",
        choices=("auto", "dummy"),
    )
    dtype: str = option(
        "auto",
        "precision of weights and embeddings; auto: the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Of prefill-decode workers."""

    task: str = option(
        "generate",
        "what the model is served for; score: a reward model with one label; embed: embeddings, no head needed",
        choices=("generate", "score", "embed"),
    )
    max_model_len: int | None = option(None, "context in tokens; default: the model's", minimum=1, maximum=MOST_TOKENS)
    quantization: str = option(
        "none",
        "int8: round an ordinary checkpoint's linear layers to eight bits at start, on a CPU",
        choices=("none", "int8"),
    )
    compile: str = option(
        "auto",
        "compile steps on a CPU, in the background while they run uncompiled; auto: a 16-bit model that is large "
        "enough to gain, where a C++ compiler is installed",
        choices=("auto", "on", "off"),
    )
    enable_cuda_graphs: bool = option(
        True, "on a GPU, replay decode steps as CUDA graphs; without, a start is faster and a step slower"
    )
    pipelining: str = option(
        "auto",
        "launch a step before the tokens of the one before it are read, so that the device need not wait; "
        "auto: on a GPU; on: on a CPU too, where it gains nothing",
        choices=("auto", "on", "off"),
    )
    target_step_ms: float | None = option(
        None,
        "milliseconds that a step should take while answers run: prompts beside them go in chunks that keep to it; "
        "0: no limit; default: 50 on a CPU, 0 on a GPU",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """Of proxies; `check_media` is for the constructors of the classes that have them."""

    allowed_local_media_path: Path | None = option(
        None, "folder whose pictures file:// URLs may name; none: file:// is refused", metavar="DIR"
    )
    allowed_media_domains: tuple[str, ...] = option(
        (),
        "hosts that pictures may be fetched from (example.com, *.example.com for those below), redirects included; "
        "default: all with a public address",
        metavar="HOST",
    )
    allowed_private_media: tuple[str, ...] = option(
        (), "private networks that pictures may be fetched from (127.0.0.0/8); default: none", metavar="CIDR"
    )

    def check_media(self) -> None:
        """Raises ConfigError: the folder is none."""
        folder = self.allowed_local_media_path
        if folder is not None and not os.path.isdir(folder):  # False too where it can't be looked at
            raise ConfigError(
                f"--allowed-local-media-path {folder}: there is no such folder, or it may not be looked at"
            )
