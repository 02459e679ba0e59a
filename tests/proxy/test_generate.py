"""`POST /generate`: which dialect a body means."""

from __future__ import annotations

from typing import Any

import pytest

from tests.proxy.conftest import Cluster


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": "x", "prompt": "y"}, "prompt"),
        ({"prompt": "x", "instance_id": 1, "max_tokens": 4}, "max_tokens"),
    ],
)
async def test_a_body_of_no_dialect_is_refused_by_name(cluster: Cluster, body: dict[str, Any], param: str) -> None:
    response = await cluster.http.post("/generate", json=body)
    assert response.status_code == 400
    error = response.json()
    assert error["param"] == error["error"]["param"] == param
    assert "inputs" in error["message"] or "LMDeploy" in error["message"]
    assert not cluster.pd.requests


async def test_what_is_no_json_is_refused(cluster: Cluster) -> None:
    response = await cluster.http.post(
        "/generate", content=b'{"inputs": "x', headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
