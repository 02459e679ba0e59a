"""Several linear layers that a model calls with the same input, as one product of all their weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers beside each other, by their names in transformers, that may have the same input."""

L = TypeVar("L", bound=nn.Linear)


def candidates(module: nn.Module, kind: type[L], panel: int) -> list[list[L]]:
    """Layers of `module` that can be one product, in the order in which they are called.

    Args:
        module: that calls them.
        kind: the class that they all must have.
        panel: all but the last must have a multiple of so many outputs, or there would be gaps between columns.
    """
    found: list[list[Any]] = [[getattr(module, name, None) for name in names] for names in _SHARING]
    return [
        cast("list[L]", layers)
        for layers in found
        if all(isinstance(layer, kind) for layer in layers)
        and len({(layer.in_features, layer.bias is None) for layer in layers}) == 1
        and all(layer.out_features % panel == 0 for layer in layers[:-1])
    ]


class SharedProduct:
    """What the first of several layers computes for all of them, and the others take their columns from."""

    def __init__(self, multiply: Callable[[torch.Tensor], torch.Tensor], layers: Sequence[nn.Linear]) -> None:
        """`multiply` gives the columns of all `layers`, in the order in which they are called."""
        self._multiply = multiply
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        """Input and product, as one value: the thread that tries a graph calls layers beside the engine's."""
        ends = itertools.accumulate((layer.out_features for layer in layers), initial=0)
        self.columns = [slice(*pair) for pair in itertools.pairwise(ends)]
        """Of each layer."""
        self.outputs = self.columns[-1].stop

    def __call__(self, rows: torch.Tensor, columns: slice) -> torch.Tensor:
        """Columns of the product. The last layer's call ends it: the product is not kept."""
        last = self._last
        product = last[1] if last is not None and last[0] is rows else self._multiply(rows)
        self._last = None if columns.stop == self.outputs else (rows, product)
        return product[..., columns]
