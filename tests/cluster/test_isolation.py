"""Neither side holds the other's weights, and the proxy holds none: seen in the processes themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import ROOT, Cluster
from workers.model_parts import load_language_part, load_vision_part

MODEL = str(CHECKPOINT_DIR)


def checkpoint_parameters() -> dict[str, int]:
    with safe_open(CHECKPOINT_DIR / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)


def is_vision(name: str) -> bool:
    return "visual" in name


def test_the_encoder_holds_the_vision_tower_and_nothing_else() -> None:
    held = [name for name, _ in load_vision_part(MODEL, "auto", "cpu").named_parameters()]
    assert held
    assert [name for name in held if not is_vision(name)] == []
    assert len(held) == sum(map(is_vision, checkpoint_parameters()))


def test_the_pd_holds_the_language_model_and_nothing_else() -> None:
    held = [name for name, _ in load_language_part(MODEL, "auto", "cpu").named_parameters()]
    assert held
    assert [name for name in held if is_vision(name)] == []


def mapped_libraries(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_the_running_proxy_has_no_torch(demo: Cluster) -> None:
    assert "libtorch" in mapped_libraries(demo.processes["pd_0"].popen.pid)
    assert "libtorch" not in mapped_libraries(demo.processes["proxy"].popen.pid)


def test_the_proxy_imports_neither_torch_nor_transformers() -> None:
    code = "import proxy.app, sys; print(sorted({'torch', 'transformers', 'redis', 'workers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
