from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epd.demo import CHECKPOINT_DIR
from epd.imports import leave_out_torchao

SCRIPT = """
import sys
from pathlib import Path
from epd.imports import leave_out_torchao
assert leave_out_torchao(Path(sys.argv[1]))
from transformers.quantizers import auto
print([name for name in sys.modules if name.startswith("torchao.")])
"""


def test_transformers_does_without_torchao() -> None:
    """In a process of its own, which imports nothing but what it needs."""
    command = [sys.executable, "-c", SCRIPT, str(CHECKPOINT_DIR)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("part", ['"quantization_config"', '"text_config": {"quantization_config"'])
def test_a_checkpoint_that_names_it_keeps_it(tmp_path: Path, part: str) -> None:
    modules: dict[str, Any] = {}
    ends = part.count("{") + 1
    (tmp_path / "config.json").write_text("{" + part + ': {"quant_method": "torchao"}' + "}" * ends)
    assert not leave_out_torchao(tmp_path, modules)
    assert modules == {}


def test_what_is_there_already_stays() -> None:
    modules: dict[str, Any] = {"torchao": sys}
    assert not leave_out_torchao(CHECKPOINT_DIR, modules)
    assert modules["torchao"] is sys


def test_without_a_checkpoint_nothing_changes(tmp_path: Path) -> None:
    modules: dict[str, Any] = {}
    assert not leave_out_torchao(tmp_path / "nowhere", modules)
    assert modules == {}
