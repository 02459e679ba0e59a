"""POST /start_profile and /stop_profile, with workers that only say what they would do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from epd.messages import ProfileReply
from tests.proxy.conftest import Cluster, ClusterFactory


def reply(state: str, *files: str, message: str = "") -> ProfileReply:
    return ProfileReply(sequence=0, state=state, files=files, message=message)


async def test_without_a_folder_it_says_what_to_do(cluster: Cluster) -> None:
    for path in ("/start_profile", "/stop_profile"):
        response = await cluster.http.post(path)
        assert response.status_code == 200
        body = response.json()
        assert (body["status"], {one["state"] for one in body["workers"].values()}) == ("off", {"off"})
        assert "--profile-dir" in body["message"]


async def test_workers_are_told_and_their_files_named(cluster: Cluster) -> None:
    cluster.pd.profile_reply = reply("started")
    body = (await cluster.http.post("/start_profile", json={"seconds": 5, "steps": 7})).json()
    pd, encoder = f"PD_INSTANCE-{cluster.pd.address}", f"E_INSTANCE-{cluster.encoder.address}"
    assert body == {"status": "ok", "workers": {pd: {"state": "started"}, encoder: {"state": "off"}}}
    cluster.pd.profile_reply = reply("stopped", "pd.json.gz")
    cluster.encoder.profile_reply = reply("failed", message="no room")
    body = (await cluster.http.post("/stop_profile", json={"model": cluster.name})).json()
    assert body["workers"] == {
        pd: {"state": "stopped", "files": ["pd.json.gz"]},
        encoder: {"state": "failed", "message": "no room"},
    }
    asked = [(one.start, one.seconds, one.steps) for one in cluster.pd.profiled]
    assert asked == [(True, 5, 7), (False, 60, 100)]


async def test_a_worker_that_goes_is_named(cluster: Cluster) -> None:
    cluster.encoder.silent = True
    asked = asyncio.create_task(cluster.http.post("/start_profile"))
    await cluster.pd.until(lambda: bool(cluster.pd.profiled))
    await cluster.encoder.stop()
    workers = (await asked).json()["workers"]
    assert workers[f"E_INSTANCE-{cluster.encoder.address}"]["state"] == "failed"
    assert workers[f"E_INSTANCE-{cluster.encoder.address}"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"seconds": 0}, 400), ({"steps": 0}, 400), ({"steps": 10**9}, 400), ({"model": "other"}, 404), ([], 400)],
)
async def test_bad_bodies(cluster: Cluster, body: Any, status: int) -> None:
    assert (await cluster.http.post("/start_profile", json=body)).status_code == status


async def test_the_admin_key_is_needed_where_there_is_one(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(admin_key="operator", api_key=("client",))
    for headers, status in (
        ({}, 401),
        ({"x-api-key": "client"}, 403),
        ({"x-admin-key": "operator"}, 200),
        ({"authorization": "Bearer operator"}, 200),
        ({"x-api-key": "operator"}, 200),
        ({"authorization": "Bearer operator", "x-admin-key": "wrong"}, 200),
        ({"x-api-key": "client", "x-admin-key": "wrong"}, 403),
    ):
        assert (await cluster.http.post("/stop_profile", headers=headers)).status_code == status


async def test_a_key_of_a_client_is_not_enough(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(api_key=("client",))
    cluster.pd.profile_reply = reply("started")
    for path in ("/start_profile", "/stop_profile"):
        response = await cluster.http.post(path, headers={"x-api-key": "client"})
        assert response.status_code == 403
        assert "--admin-key" in response.json()["error"]["message"]
    assert not cluster.pd.profiled


async def test_nobody_to_ask(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=0, encoders=0)
    assert (await cluster.http.post("/start_profile")).status_code == 503
