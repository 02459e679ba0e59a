"""What a real cluster tells of itself: `epd status`, and the figures of all its processes."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from epd.cli import main
from epd.cluster_view import ClusterView
from tests.cluster.harness import Cluster
from tests.cluster.reference import picture, user


def test_status_of_a_real_cluster(demo: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = demo.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Who are you?"}]})
    assert status == 200
    assert main(["status", "--url", demo.base_url, "--json"]) == 0
    encoder, pd = msgspec.json.decode(capsys.readouterr().out, type=ClusterView).workers
    assert (encoder.role, pd.role) == ("encoder", "pd")
    assert (encoder.model, encoder.state, pd.state) == ("test-model", "ready", "ready")
    assert encoder.age_s is not None
    assert pd.kv_total_blocks > 0
    assert encoder.incarnation != pd.incarnation
    assert main(["status", "--url", demo.base_url]) == 0
    assert "test-model" in capsys.readouterr().out


def test_figures_of_all_roles_are_there_for_prometheus(demo: Cluster) -> None:
    body = {"messages": [user(picture(77), "What is it?")], "max_tokens": 4, "ignore_eos": True}
    assert demo.post("/v1/chat/completions", body)[0] == 200
    families = {one.name: one for one in text_string_to_metric_families(demo.get("/metrics?format=prometheus")[1])}
    spread = {
        (one.labels["role"], one.labels["stage"]): one.value
        for one in families["epd_stage_seconds"].samples
        if one.name.endswith("_bucket") and one.labels["le"] == "120.0"
    }
    for role, stages in (
        ("encoder", ("e2e", "encode_queue", "preprocess", "encode", "transfer")),
        ("pd", ("e2e", "queue", "embeddings_wait", "prefill", "time_to_first_token", "decode")),
    ):
        for stage in stages:
            assert spread[role, stage] >= 1
    (misses,) = families["epd_worker_embedding_cache_misses"].samples
    assert misses.value >= 1
    (made,) = families["epd_completion_tokens"].samples
    assert made.labels == {"model": "test-model"}
    assert made.value >= 4


def test_a_profile_has_the_operations_of_both_workers(demo: Cluster, profile_folder: Path) -> None:
    status, started = demo.post("/start_profile", {"seconds": 30})
    assert (status, {one["state"] for one in started["workers"].values()}) == (200, {"started"})
    body = {"messages": [user(picture(78), "What is it?")], "max_tokens": 4, "ignore_eos": True}
    assert demo.post("/v1/chat/completions", body)[0] == 200
    status, stopped = demo.post("/stop_profile", {})
    assert (status, stopped["status"]) == (200, "ok")
    for role in ("E", "PD"):
        (worker,) = (one for name, one in stopped["workers"].items() if name.startswith(f"{role}_INSTANCE"))
        (file,) = worker["files"]
        with gzip.open(profile_folder / file) as opened:
            assert b"aten::linear" in opened.read()
    assert demo.post("/v1/chat/completions", body)[0] == 200
