from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from epd.bench import engine
from epd.bench.engine import DecodeFigures, EngineBench, EngineFigures, Machine, PrefillFigures, format_engine_figures
from epd.cli import main
from tests import checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build_qwen2_5_vl(tmp_path_factory.mktemp("engine") / "model")


def test_all_figures_are_measured(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    flags = ["--batch", "1,3", "--context", "20", "--prefill", "32", "--rounds", "2", "--steps", "2"]
    threads = torch.get_num_threads()
    try:
        code = main(["bench", "engine", "--model", str(model), "--threads", "1", *flags, "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    figures = json.loads(file.read_text())
    assert (figures["dtype"], figures["threads"]) == ("float32", 1)
    assert [row["batch"] for row in figures["decode"]] == [1, 3]
    for row in [*figures["decode"], figures["prefill"], figures["machine"]]:
        assert all(value > 0 for value in row.values()), row
    for row in figures["decode"]:
        assert row["forward"] < row["ours"], "a step costs more than the model in it"
    assert "| 3 " in capsys.readouterr().out


def test_bytes_of_a_step(model: Path, tmp_path: Path) -> None:
    """Every weight is read but the embedding's unless it is the head too; keys and values for each token."""
    untied = engine._Theirs(EngineBench(model=model))
    embedding = untied.model.get_input_embeddings().weight
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, bytes
    weights = sum(p.nbytes for p in untied.model.parameters())
    assert untied.step_bytes(3, 10) == weights - embedding.nbytes + 30 * per_token
    tied = engine._Theirs(EngineBench(model=checkpoints.build_qwen2(tmp_path, tie_word_embeddings=True)))
    assert tied.step_bytes(0, 0) == sum(p.nbytes for p in tied.model.parameters())


def test_the_ratios() -> None:
    figures = EngineFigures(
        "float32",
        1,
        Machine(10, 100),
        PrefillFigures(tokens=100, ours=50, transformers=100, floor=25),
        (DecodeFigures(batch=4, ours=20, forward=16, transformers=40, floor=10),),
    )
    tables = [line for line in format_engine_figures(figures).splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in tables[2].split("|")[1:-1]] == [
        "4", "20.0", "16.0", "1.25", "40.0", "0.50", "10.0", "2.00", "200",
    ]  # fmt: skip
    assert [cell.strip() for cell in tables[5].split("|")[1:-1]] == ["100", "2000", "1000", "2.00", "4000", "0.50"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--engine", '{"warp": 9}'], "warp"),
        (["--batch", "many"], "--batch many"),
        (["--batch", "0"], "--batch"),
        (["--rounds", "1"], "--rounds 1"),
        (["--engine", '{"kv_cache_memory_bytes": 65536, "max_model_len": 16}'], "no room"),
    ],
)
def test_bad_flags(model: Path, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--model", str(model), *flags]) == 2
    assert named in capsys.readouterr().err
