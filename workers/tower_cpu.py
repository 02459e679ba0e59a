"""What makes a vision tower faster on a CPU, in bfloat16: its attention, its linear layers, its cut into patches.

- The towers of the Qwen families attend within windows or pictures, one call each: dozens of calls a layer. Told that
  there is flash attention, they hand over all rows and where sequences end, and one call of our kernel does it.
- Linear layers are packed as those of the language model are (`workers.engine.packed_linear`).
- A convolution over patches that are cut already is a matrix product; oneDNN takes five times as long for it.
- What stands between the products takes one pass each (`workers.tower_kernel`), where the module is a known one.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from workers import tower_kernel
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
        if tower_kernel.is_available():
            _fuse(model)


def _fuse(model: PreTrainedModel) -> None:
    """Replace what the modules of known families compute between their products."""
    for module in model.modules():
        kind = _FUSED.get(type(module).__name__)
        if kind is not None and type(module).__module__.startswith("transformers.models.qwen"):
            module.__class__ = kind


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


class FusedAttention(nn.Module):
    """The attention of a Qwen tower; never constructed."""

    qkv: nn.Module
    proj: nn.Module
    num_heads: int
    scaling: float

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        """[patches, hidden size] → [patches, hidden size]; `cu_seqlens` says where sequences end."""
        heads, count = self.num_heads, len(hidden_states)
        sides = self.qkv(hidden_states).view(count, 3 * heads, -1)
        cosines, sines = (side.float().contiguous() for side in position_embeddings)
        rotated = tower_kernel.rotate(sides[:, : 2 * heads], cosines, sines)
        queries, keys, values = rotated[:, :heads], rotated[:, heads:], sides[:, 2 * heads :]
        attended: torch.Tensor = self.proj(_attend(queries, keys, values, self.scaling, cu_seqlens).reshape(count, -1))
        return attended


class FusedNorm(nn.Module):
    """Root mean square normalisation of a Qwen tower; never constructed."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[…, hidden size] → […, hidden size]."""
        return tower_kernel.normalise(rows, self.weight, self.variance_epsilon)


class FusedGate(nn.Module):
    """The gated layers of a Qwen tower; never constructed."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[patches, hidden size] → [patches, hidden size]."""
        left, right = self.gate_proj(rows), self.up_proj(rows)
        is_silu = type(self.act_fn).__name__.startswith("SiLU")
        gated = tower_kernel.gate(left, right) if is_silu else self.act_fn(left) * right
        output: torch.Tensor = self.down_proj(gated)
        return output


_FUSED: dict[str, type[nn.Module]] = {
    "VisionAttention": FusedAttention,
    "Qwen2_5_VLVisionAttention": FusedAttention,
    "Qwen3VLVisionAttention": FusedAttention,
    "Qwen2_5_VLRMSNorm": FusedNorm,
    "Qwen2_5_VLMLP": FusedGate,
}
"""By the names of classes in transformers."""


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
    queries, keys, values = (side[0].transpose(0, 1) for side in (query, key, value))
    return _attend(queries, keys, values, scaling, cu_seq_lens_q)[None], None


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, bounds: torch.Tensor
) -> torch.Tensor:
    """Attention within the sequences between `bounds`: [patches, heads, head dim] each, and so the result."""
    first, *ends = bounds.tolist()
    lengths = [end - start for start, end in itertools.pairwise((first, *ends))]
    if sum(length**2 for length in lengths) >= attention_dense.WORTHWHILE_SCORES:
        return attention_dense.attend(queries, keys, values, scale, row_ends=ends)
    parts = zip(
        *(torch.split(side.transpose(0, 1)[None], lengths, dim=2) for side in (queries, keys, values)), strict=True
    )
    attended = [scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1) for q, k, v in parts]
    return torch.cat(attended)
