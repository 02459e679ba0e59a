"""Which part of a checkpoint a worker owns, and how to load only that part.

The model is the transformers class itself. A worker gets a subclass of it whose constructor builds the whole model
on the meta device (shapes, no memory) and then deletes what another kind of worker owns: the vision tower on a
prefill-decode worker, the language model and its head on an encoder. `from_pretrained` of that subclass then applies
everything that transformers knows: names of older checkpoints, tied weights, quantisers, float32 islands.

What transformers 5.23 does with it:

- Checkpoint tensors are opened as lazy slices; those that match no parameter of the model are counted as unexpected
  and never read, so an encoder reads its tower from the disk and not the many times larger rest.
- The attributes that a parent collects from its children while it is built (tied weights) still name the deleted
  parts, so they are cut as well.
- `get_rope_index` reads nothing but the config, so it works without the vision tower.
- `device_map` needs the accelerate package; loading on the CPU and moving does not.
- Missing weights are only a warning there, and are then drawn at random. Here they are an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from epd.errors import ConfigError
from epd.types import WorkerTask
from workers import dummy_weights, quantization
from workers.families import family_of
from workers.model_tasks import architecture, is_multimodal, model_class

log = logging.getLogger(__name__)


def load_config(path: str) -> PretrainedConfig:
    """The checkpoint's config.

    Raises:
        ConfigError: the folder has no config that transformers can read.
    """
    try:
        # Said, because transformers else asks at the terminal whether to run Python that the checkpoint ships.
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no readable model config: {error}") from error
    return config


def load_language_part(
    path: str,
    dtype: str | torch.dtype,
    device: str | torch.device,
    *,
    attn_implementation: str | None = None,
    task: WorkerTask = WorkerTask.GENERATE,
    load_format: str = "auto",
    num_ranks: int = 1,
) -> PreTrainedModel:
    """The language model without its vision tower, in eval mode.

    Args:
        path: checkpoint folder.
        dtype: of the weights; "auto" for the checkpoint's own.
        device: where the weights go.
        attn_implementation: name in transformers' attention interface; None for its default.
        task: decides which head it has.
        load_format: "auto" for the checkpoint's weights, "dummy" for random ones without looking for files.
        num_ranks: of the default process group that share the weights by the family's tensor parallel plan. All of
            them make this call.

    Returns:
        The class that `model_class` says. `get_decoder()`, `get_input_embeddings()` and `get_output_embeddings()` work;
        forward of the whole works on text.

    Raises:
        ConfigError: the family or the task is not covered, or the checkpoint lacks weights.
    """
    config = load_config(path)
    dropped = family_of(config).vision if is_multimodal(config) else ()
    return _load(
        path, config, model_class(config, task), dropped, dtype, device, attn_implementation, load_format, num_ranks
    )


def load_vision_part(
    path: str,
    dtype: str | torch.dtype,
    device: str | torch.device,
    *,
    attn_implementation: str | None = None,
    load_format: str = "auto",
) -> PreTrainedModel:
    """The model around its vision tower, without language model and head, in eval mode.

    Args and errors: as `load_language_part`.

    Returns:
        The checkpoint's own class; `get_image_features` works, forward does not.
    """
    config = load_config(path)
    if not is_multimodal(config):
        raise ConfigError(f"{path}: {architecture(config)} has no vision part, so it needs no encoder")
    dropped = family_of(config).language
    return _load(path, config, model_class(config), dropped, dtype, device, attn_implementation, load_format)


def _without(whole_class: type[PreTrainedModel], dropped: tuple[str, ...]) -> type[PreTrainedModel]:
    """A subclass of `whole_class` that is built without the submodules `dropped`.

    It keeps the name and module of the original, which transformers looks things up by.
    """

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (a method, of the class below)
        super(partial_class, self).__init__(config, *args, **kwargs)
        for path in dropped:
            _delete(self, path)

    patterns = {rf"^{path.replace('.', '[.]')}([.]|$)" for path in dropped}
    members = {
        "__init__": __init__,
        "__module__": whole_class.__module__,
        # Only what we dropped on purpose is silenced; other surplus keys still get transformers' report.
        "_keys_to_ignore_on_load_unexpected": patterns | set(whole_class._keys_to_ignore_on_load_unexpected or ()),
    }
    partial_class: type[PreTrainedModel] = type(whole_class.__name__, (whole_class,), members)
    return partial_class


def _delete(model: PreTrainedModel, path: str) -> None:
    parent, _, name = path.rpartition(".")
    delattr(model.get_submodule(parent), name)
    gone = f"{path}."
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if not target.startswith(gone) and not source.startswith(gone)
    }


def _load(
    path: str,
    config: PretrainedConfig,
    whole_class: type[PreTrainedModel],
    dropped: tuple[str, ...],
    dtype: str | torch.dtype,
    device: str | torch.device,
    attn_implementation: str | None,
    load_format: str,
    num_ranks: int = 1,
) -> PreTrainedModel:
    device = torch.device(device)
    partial_class = _without(whole_class, dropped)
    if load_format == "dummy" and num_ranks > 1:
        raise ConfigError("--load-format dummy makes the weights of one process; leave out --tp")
    if load_format == "dummy":
        log.warning("random weights for %s: answers mean nothing", architecture(config))
        dummy = dummy_weights.build(partial_class, config, dtype, device, attn_implementation)
        return dummy.eval().requires_grad_(False)
    quantization.check(config, dtype, device, num_ranks=num_ranks)
    kwargs = quantization.placement(config, device)
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if num_ranks > 1:
        kwargs["distributed_config"] = DistributedConfig(tp_size=num_ranks)
    try:
        model, info = partial_class.from_pretrained(
            path, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise ConfigError(f"{path}: the weights cannot be read: {error}") from error
    _refuse_missing(path, info["missing_keys"])
    placed = model if "device_map" in kwargs else model.to(device)
    loaded: PreTrainedModel = placed.eval().requires_grad_(False)
    log.info("loaded %s%s", architecture(config), f" without {', '.join(dropped)}" if dropped else "")
    return loaded


def _refuse_missing(path: str, missing: Iterable[str]) -> None:
    names = sorted(missing)
    if names:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise ConfigError(f"{path}: the checkpoint lacks {len(names)} weights: {shown}")
