"""Which class of transformers serves a checkpoint for a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from epd.errors import ConfigError
from epd.types import WorkerTask

_SCORING = "ForSequenceClassification"


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether the checkpoint has a vision part, covered here or not."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or hasattr(config, "vision_config")


def architecture(config: PretrainedConfig) -> str:
    """The class that the checkpoint was saved from, for people."""
    named = config.architectures or [type(config).__name__]
    return str(named[0])


def model_class(config: PretrainedConfig, task: WorkerTask = WorkerTask.GENERATE) -> type[PreTrainedModel]:
    """The class to load the checkpoint as.

    Raises:
        ConfigError: there is none for this task; names the task that there is one for.
    """
    named = architecture(config)
    if task is WorkerTask.SCORE:
        return _scoring_class(config, named)
    if named.endswith(_SCORING):
        raise ConfigError(f"{named} gives scores and nothing else: start it with --task score")
    if task is WorkerTask.EMBED:
        if is_multimodal(config):
            raise ConfigError(f"{named} takes pictures: serve it with --task generate, which gives embeddings too")
        return _lookup(MODEL_MAPPING_NAMES, config, named, "no text model that gives hidden states")
    if is_multimodal(config):
        return _lookup(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, config, named, "no causal language model")
    base = MODEL_MAPPING_NAMES.get(config.model_type)
    if named == base:
        raise ConfigError(f"{named} has no head that gives tokens: start it with --task embed")
    return _lookup(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config, named, "no causal language model")


def score_head(model: Any) -> Any | None:
    """What makes a score of a hidden state, [rows, hidden size] → [rows, 1]; None: the model gives none."""
    return model.score if isinstance(model, GenericForSequenceClassification) else None


def _scoring_class(config: PretrainedConfig, named: str) -> type[PreTrainedModel]:
    if not named.endswith(_SCORING):
        raise ConfigError(f"--task score needs a checkpoint of a …{_SCORING} class, and this is a {named}")
    if config.num_labels != 1:
        raise ConfigError(f"--task score needs one label, and this {named} has {config.num_labels}")
    found = _lookup(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, config, named, "no classifier")
    if not issubclass(found, GenericForSequenceClassification):
        raise ConfigError(f"{named} is not covered: its head is not a linear map of the last token")
    return found


def _lookup(table: Mapping[str, Any], config: PretrainedConfig, named: str, problem: str) -> type[PreTrainedModel]:
    name = table.get(config.model_type)
    if not isinstance(name, str):
        raise ConfigError(f"{named} (model type {config.model_type}) is {problem}")
    found: type[PreTrainedModel] = getattr(transformers, name)
    return found
