"""Which models the engine can run: asked before it serves, so that none answers wrongly.

The engine packs tokens of many requests into one row and keeps keys and values of one size in blocks. That is right
for a model if, and only if, nothing but attention lets tokens meet, all attention goes through transformers' attention
interface, and each layer keeps one pair of keys and values per token. What a class says of itself is checked before
its weights are read; what its layers really keep is seen by running two tokens through them.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from epd.errors import ConfigError
from workers.engine import attention
from workers.engine.adapter import PlainPositions
from workers.engine.attention import AttentionBackend
from workers.engine.language_model import LanguageModel
from workers.engine.paged_kv import KVShape

log = logging.getLogger(__name__)

_ARGUMENTS = ("inputs_embeds", "position_ids")
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def check_class(model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
    """Refuse what can be told without weights.

    Raises:
        ConfigError: the class is not covered. Names it, and why.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES
    if model_class._is_stateful or kinds:
        what = f" ({', '.join(sorted(kinds))})" if kinds else ""
        raise _not_covered(model_class, f"its layers{what} keep something else than the keys and values of all tokens")
    if not model_class._supports_attention_backend:
        raise _not_covered(model_class, "its attention can't be replaced by the paged one")
    arguments = inspect.signature(model_class.forward).parameters
    missing = [name for name in _ARGUMENTS if name not in arguments]
    if missing or config.is_encoder_decoder:
        raise _not_covered(model_class, f"its forward takes no {', '.join(missing) or 'prompt without an encoder'}")


def check_context(config: PretrainedConfig, context: int) -> None:
    """Refuse a context in which the rotation of keys would depend on how long other requests are.

    Args:
        config: of the whole model.
        context: tokens that a request may have in all.

    Raises:
        ConfigError: says which context would do.
    """
    text_config = config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    limit = {
        "dynamic": text_config.max_position_embeddings,
        "longrope": rope.get("original_max_position_embeddings", text_config.max_position_embeddings),
    }.get(kind, context)
    if context > limit:
        raise ConfigError(
            f"with {kind} rotary embeddings all requests of a step share one scale, so a context of {context} tokens "
            f"is not covered; set max_model_len to {limit} at most"
        )
    made_for = getattr(text_config, "max_position_embeddings", None) or context
    if context > made_for and not rope:  # a table of positions ends there
        raise ConfigError(f"the model has {made_for} positions; set max_model_len to {made_for} at most")
    if context > made_for:
        log.warning("the model was made for %d tokens: behind them answers may be nonsense", made_for)


def fix_rotation(model: PreTrainedModel) -> None:
    """Stop dynamic rotary embeddings from looking at each step's positions, which within `check_context` is in vain.

    It would wait for the device in every step, and no graph could be made of it.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            module.rope_type = "default"  # that is: use the frequencies that are there


def check_layers(model: PreTrainedModel, adapter: PlainPositions, shape: KVShape) -> None:
    """Refuse a model whose layers do not fill the cache as `shape` says, by running two tokens through them.

    Raises:
        ConfigError: the model is not covered. Names its class, and why.
    """
    model_class = type(model)
    if any(getattr(module, "is_causal", True) is False for module in model.modules() if hasattr(module, "layer_idx")):
        raise _not_covered(model_class, "its tokens see later ones")
    recorder = _Recorder(model.device)
    try:
        _run_two_tokens(model, adapter, recorder)
    except Exception as error:  # the model's own code, which no list of errors covers
        raise _not_covered(model_class, f"it can't be run: {error}") from error
    wanted = (shape.num_kv_heads, shape.head_dim, shape.head_dim)
    if sorted(recorder.kept) != list(range(shape.num_layers)):
        layers = f"{len(set(recorder.kept))} of {shape.num_layers}"
        raise _not_covered(model_class, f"{layers} layers keep keys and values, {len(recorder.kept)} times in all")
    odd = next((kept for kept in recorder.kept.values() if kept != wanted), None)
    if odd is not None:
        raise _not_covered(
            model_class,
            f"a layer keeps {odd[0]} keys of {odd[1]} and values of {odd[2]} numbers a token, "
            f"where its config promises {wanted[0]} of {wanted[1]}",
        )


class _Recorder(AttentionBackend):
    """Notes what each layer hands over to keep, and attends to nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[int, tuple[int, int, int]] = {}
        """Layer → kv heads, numbers of a key, numbers of a value."""

    def forward(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """See the base class."""
        if layer in self.kept:
            raise ValueError(f"layer {layer} attends twice")
        self.kept[layer] = (keys.shape[1], keys.shape[2], values.shape[2])
        return queries.new_zeros(*queries.shape[:2], values.shape[2])

    def _prepare(self, chunks: Any) -> None: ...

    def _attend(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError


@torch.inference_mode()
def _run_two_tokens(model: Any, adapter: PlainPositions, recorder: _Recorder) -> None:
    embeds = model.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    positions, _ = adapter.prompt_positions([0, 0], [])
    with attention.use_backend(recorder):
        LanguageModel(model, adapter).hidden(embeds[0], positions.to(model.device))


def _not_covered(model_class: type[PreTrainedModel], reason: str) -> ConfigError:
    return ConfigError(f"{model_class.__name__} is not covered: {reason}")
