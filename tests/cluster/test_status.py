"""`epd status` on a real cluster."""

from __future__ import annotations

import msgspec
import pytest

from epd.cli import main
from epd.cluster_view import ClusterView
from tests.cluster.harness import Cluster


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
