"""Models of random weights where a checkpoint has none: `--load-format dummy`, to measure real shapes without them."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from epd.errors import ConfigError

_SEED = 0


def build(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: str | torch.dtype,
    device: str | torch.device,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """A model with the weights that the family draws before training, the same ones at every start.

    Their spread is the config's `initializer_range`, so values stay finite and answers mean nothing.

    Args:
        model_class: may leave out parts of the model; those take no memory at any time.
        config: changed to say dtype and attention.
        dtype: of the weights; "auto" for the config's, or float32 when it says none.
        device: where they are drawn.
        attn_implementation: name in transformers' attention interface; None for its default.

    Raises:
        ConfigError: the config asks for quantised weights, which can't be drawn.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError("--load-format dummy: the checkpoint's config asks for quantised weights; remove that part")
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    device = torch.device(device)
    # First without memory, so that the parts that `model_class` leaves out never exist.
    with torch.device("meta"), init.no_init_weights():
        model: PreTrainedModel = model_class._from_config(config, dtype=_dtype(config, dtype), **kwargs)
    model.to_empty(device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(_SEED)
        model.initialize_weights()
    model.tie_weights(recompute_mapping=False)  # that of a model that lacks parts is right already
    return model


def _dtype(config: PretrainedConfig, dtype: str | torch.dtype) -> torch.dtype:
    chosen = config.get_text_config().dtype or config.dtype if dtype == "auto" else dtype
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen)
    return chosen if isinstance(chosen, torch.dtype) else torch.float32
