from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from epd.errors import ConfigError
from tests.workers.engine.oracle import Oracle, add, make_engine, run
from workers.engine import int8_kernel, int8_linear

CPU = torch.device("cpu")


@pytest.fixture(params=["kernel", "oneDNN"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[nn.Linear]:
    """What layers become: with our kernel, and where it can't be made."""
    if request.param == "oneDNN" or not int8_kernel.is_available():
        monkeypatch.setattr(int8_kernel, "is_available", lambda: False)
        return int8_linear.Int8Linear
    return int8_linear.KernelLinear


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_numbers(dtype: torch.dtype) -> None:
    """Written out in plain arithmetic; a row's result does not depend on the rows beside it."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 160).to(dtype)
    small = nn.Linear(64, 4).to(dtype)
    weight, rows = layer.weight.detach().float(), torch.randn(3, 5, 64).to(dtype)
    rows[1, 2] *= 1000
    rows[0, 0] = 0

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scales = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
        return (values / scales).round() * scales

    with torch.inference_mode():
        expected = rounded(rows.float()) @ rounded(weight).T + layer.bias.float()
        assert int8_linear.convert(nn.ModuleList([layer, small])) == 1
        assert type(small) is nn.Linear
        actual, alone = layer(rows), layer(rows[1, 2])
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-3)
    torch.testing.assert_close(alone, actual[1, 2], rtol=0, atol=0)


@pytest.mark.usefixtures("product")
def test_values_that_are_no_numbers_spread_in_their_row_alone() -> None:
    layer, rows = nn.Linear(64, 128), torch.ones(2, 64)
    rows[0, 3] = torch.nan
    int8_linear.convert(layer)
    with torch.inference_mode():
        assert layer(rows).isnan().all(dim=-1).tolist() == [True, False]


class Layers(nn.Module):
    """Of a kind that share their input, in a model that calls `calls` of them."""

    def __init__(self, calls: Sequence[str] = ("q_proj", "k_proj", "v_proj"), outputs: int = 192) -> None:
        super().__init__()
        self.calls = calls
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, outputs), nn.Linear(64, 128), nn.Linear(64, 130)

    def forward(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [getattr(self, name)(rows) for name in self.calls]


@pytest.mark.parametrize(
    "calls", [("q_proj", "k_proj", "v_proj"), ("v_proj", "q_proj"), ("k_proj", "q_proj", "k_proj")]
)
def test_layers_of_one_input_are_one_product(calls: Sequence[str]) -> None:
    """Whatever the order of the calls is, each gives what it gives by itself, for its own input."""
    if not int8_kernel.is_available():
        pytest.skip("oneDNN computes layers one by one")
    model = Layers(calls)
    alone = copy.deepcopy(model)
    int8_linear.convert(model)
    for layer in (alone.q_proj, alone.k_proj, alone.v_proj):
        int8_linear.convert(layer)
    assert model.q_proj.shared is model.v_proj.shared is not None
    with torch.inference_mode():
        for rows in torch.randn(3, 5, 64):
            for actual, expected in zip(model(rows), alone(rows), strict=True):
                assert torch.equal(actual, expected)


def test_layers_that_would_leave_gaps_stay_apart() -> None:
    model = Layers(outputs=130)
    assert int8_linear.convert(model) == 3
    assert getattr(model.q_proj, "shared", None) is None
    with torch.inference_mode():
        assert [output.shape[1] for output in model(torch.randn(2, 64))] == [130, 128, 130]


def test_an_engine_answers_in_eight_bits(qwen2_5_vl: Oracle, product: type[nn.Linear]) -> None:
    """Rounded weights of random models answer something of their own, but the same alone and in company."""
    if not int8_linear.is_available(CPU):
        with pytest.raises(ConfigError, match="VNNI"):
            make_engine(qwen2_5_vl.path, quantization="int8")
        return
    prompts = [qwen2_5_vl.prompt(text) for text in ("what is it?", "describe", "what")]
    engine = make_engine(qwen2_5_vl.path, quantization="int8", enable_prefix_caching=False)
    head: Any = engine._runner
    assert type(head._forward._model._head) is product
    plain: Any = make_engine(qwen2_5_vl.path)._runner  # whether compiling is worth while is told by their number
    assert head._forward._model.num_parameters >= 0.95 * plain._forward._model.num_parameters
    alone = []
    for prompt in prompts:
        add(engine, "a", prompt)
        alone.append(run(engine).tokens["a"])
    for name, prompt in zip("bcd", prompts, strict=True):
        add(engine, name, prompt)
    together = run(engine).tokens
    assert [together[name] for name in "bcd"] == alone


def test_what_it_does_not_fit_is_refused(qwen2: Oracle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none or int8"):
        make_engine(qwen2.path, quantization="int3")
