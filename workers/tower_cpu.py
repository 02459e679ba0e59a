"""What makes a vision tower faster on a CPU, in bfloat16: its attention, its linear layers, its cut into patches.

- The towers of the Qwen families attend within windows or pictures, one call each: dozens of calls a layer. Told that
  there is flash attention, they hand over all rows and where sequences end, and one call of our kernel does it.
- Linear layers are packed as those of the language model are (`workers.engine.packed_linear`).
- A convolution over patches that are cut already is a matrix product; oneDNN takes five times as long for it.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from workers.engine import attention_dense, packed_linear

log = logging.getLogger(__name__)

_ATTENTION = "epd_flash"
"""The towers ask for "flash" in the name of their attention."""


def speed_up(model: PreTrainedModel, *, has_sequences: bool) -> None:
    """Change a model around a vision tower in place, as far as this processor gains by it.

    Args:
        model: as `workers.model_parts.load_vision_part` returns it.
        has_sequences: its tower hands flash attention `cu_seq_lens_q`, and no mask.
    """
    if not packed_linear.is_available(model.dtype, model.device):
        return
    packed_linear.pack(model)
    for module in model.modules():
        if type(module) is nn.Conv3d and _is_patch_by_patch(module):
            module.__class__ = PatchProjection  # the same object, since others may hold it
    if has_sequences and attention_dense.is_faster(model.dtype, model.device):
        AttentionInterface.register(_ATTENTION, _attention)
        model.config.vision_config._attn_implementation = _ATTENTION


def _is_patch_by_patch(module: nn.Conv3d) -> bool:
    is_plain = module.groups == 1 and set(module.padding) == {0} and set(module.dilation) == {1}
    return is_plain and module.stride == module.kernel_size


class PatchProjection(nn.Conv3d):
    """A convolution whose inputs may be single patches; never constructed."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[patches, channels, …] → [patches, out, …]."""
        if patches.shape[2:] != self.kernel_size:
            return super().forward(patches)
        rows = linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return rows[:, :, None, None, None]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What a tower calls per layer: query [1, heads, patches, head dim] → [1, patches, heads, head dim]."""
    if attention_mask is not None:
        raise NotImplementedError("the attention of vision towers takes no mask")
    first, *ends = cu_seq_lens_q.tolist()
    scores = sum((end - start) ** 2 for start, end in itertools.pairwise((first, *ends)))
    if scores < attention_dense.WORTHWHILE_SCORES:
        return _by_sdpa(query, key, value, scaling, [first, *ends]), None
    queries, keys, values = (side[0].transpose(0, 1) for side in (query, key, value))
    return attention_dense.attend(queries, keys, values, scaling, row_ends=ends)[None], None


def _by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, ends: list[int]
) -> torch.Tensor:
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    parts = zip(*(torch.split(side, lengths, dim=2) for side in (query, key, value)), strict=True)
    attended = [scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2) for q, k, v in parts]
    return torch.cat(attended, dim=1)
