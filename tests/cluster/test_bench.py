"""Load and soak on real clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from epd.bench.load import Pace
from epd.bench.serve import ServeBench, run_serve
from epd.bench.soak import SoakBench, format_soak, run_soak
from epd.bench.workload import Workload
from epd.cli import main
from tests.cluster.harness import Cluster


async def test_load_on_a_cluster(demo: Cluster) -> None:
    workload = Workload(mix="mixed", image_size=(112, 112), input_tokens=64, output_tokens=6)
    report = await run_serve(
        ServeBench(base_url=demo.base_url, pace=Pace(concurrency=4), num_requests=12, workload=workload)
    )
    assert report.model == "test-model"
    assert report.total.errors == {}
    assert report.refused_fields == ()
    assert {record.output_tokens for record in report.requests} == {6}, "the end is ignored, so that all are as long"
    prompts = {
        kind: [record.prompt_tokens or 0 for record in report.requests if record.kind == kind]
        for kind in ("text", "image")
    }
    assert min(prompts["image"]) > max(prompts["text"]), "pictures take tokens"
    assert all(48 <= length <= 80 for length in prompts["text"])


def test_the_command_writes_its_files(demo: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    load = ["--base-url", demo.base_url, "--num-requests", "4", "--concurrency", "2", "--output-tokens", "3"]
    assert main(["bench", "serve", *load, *files, "--label", "ours", "--fail-on-error"]) == 0
    assert "| text |" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "compare", str(tmp_path / "a.json")]) == 0
    assert "| ours   | text |" in capsys.readouterr().out
    # More pictures than a request may have: each is refused.
    huge = ["--mix", "image", "--images-per-request", "33", "--image-size", "28x28"]
    assert main(["bench", "serve", *load, *huge]) == 0
    assert "4 failed: http 413" in capsys.readouterr().out
    assert main(["bench", "serve", *load, *huge, "--fail-on-error"]) == 1


async def test_soak() -> None:
    """The real one has 2,000 requests; see `epd bench soak`."""
    result = await run_soak(SoakBench(requests=60, concurrency=16, pool=14, kv_cache_memory_bytes=1 << 20))
    assert result.violations == [], format_soak(result)
    assert result.right > 30
    assert result.right + result.left == 60
    assert result.preemptions > 0
    assert all(first > 0 and last > 0 for first, last in result.memory.values())
