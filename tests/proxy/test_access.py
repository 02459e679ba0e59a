"""Keys, origins, limits of keys, the path behind a gateway: over real HTTP."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from epd.config import ProxyConfig
from epd.errors import ConfigError
from proxy.access import OPEN_PATHS
from proxy.app import create_app
from tests.proxy.conftest import Cluster, ClusterFactory, ask
from tests.proxy.fakes import Received
from tests.proxy.test_requests import assert_error

PAGE = "https://app.example"
GUARDED = ("/v1/models", "/cluster", "/health/full", "/token_load", "/v1/nothing", "/v1/chat/completions", "/nowhere")


async def get(cluster: Cluster, path: str, **headers: str) -> httpx.Response:
    return await cluster.http.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})


async def test_what_is_guarded_needs_a_good_key(
    start_cluster: ClusterFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "keys"
    file.write_text("# clients\nfrom-file\n\n")
    cluster = await start_cluster(api_key=("first", "second"), api_key_file=file, admin_key="operator")
    for path in GUARDED:
        response = await get(cluster, path)
        assert (path, response.status_code) == (path, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
        assert_error(response.json(), 401, code="invalid_api_key")
        assert response.json()["type"] == "authentication_error"
    for path in OPEN_PATHS - {"/liveness", "/readiness"}:  # of dialects that are not there yet
        assert ((await get(cluster, path)).status_code, path) == (200, path)
    for key in ("first", "second", "from-file", "operator"):
        for headers in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"x_api_key": key}):
            assert (await get(cluster, "/v1/models", **headers)).status_code == 200
    assert (await get(cluster, "/v1/models", x_admin_key="operator")).status_code == 200
    for headers in (
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic first"},
        {"authorization": "first"},
        {"x_api_key": "firs"},
        {"x_api_key": "first,second"},
        {"cookie": "first"},
    ):
        assert (await get(cluster, "/v1/models", **headers)).status_code == 401
    for secret in ("first", "from-file", "operator", "wrong"):
        assert secret not in caplog.text
        assert secret not in repr(cluster.service.config)


async def test_the_documents_say_where_a_key_is_needed(start_cluster: ClusterFactory) -> None:
    document = (await (await start_cluster(api_key=("k",))).http.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    assert {"bearer": []} in document["security"]
    assert "security" not in document["paths"]["/v1/chat/completions"]["post"]
    assert document["paths"]["/health"]["get"]["security"] == []


async def test_clients_bring_their_key_by_themselves(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(api_key=("good",))
    bad = cluster.openai
    answer = await bad.with_options(api_key="good").chat.completions.create(
        model=cluster.name, messages=[{"role": "user", "content": "x"}]
    )
    assert answer.choices[0].message.content == "hello world"
    with pytest.raises(openai.AuthenticationError) as error:
        await bad.models.list()
    assert error.value.code == "invalid_api_key"


async def test_a_key_has_its_share_of_requests(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(api_key=("a", "b"), admin_key="c", max_requests_per_key=1)
    cluster.pd.script = cluster.pd.say_nothing

    def chat(key: str) -> asyncio.Task[httpx.Response]:
        body, headers = {"messages": ask("x")}, {"x-api-key": key, "x-request-id": f"of-{key}"}
        return asyncio.create_task(cluster.http.post("/v1/chat/completions", json=body, headers=headers))

    running = chat("a")
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    refused = await chat("a")
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert_error(refused.json(), 429, code="rate_limit_exceeded")
    assert refused.json()["type"] == "rate_limit_error"
    others = [chat("b"), chat("c"), chat("c")]  # the operators' has no limit
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 4)
    assert (await get(cluster, "/v1/models", x_api_key="a")).status_code == 200
    nothing = await cluster.http.post("/abort", json={"request_id": "of-a"}, headers={"x-api-key": "b"})
    assert nothing.json()["aborted"] == []  # what others have is theirs
    aborted = await cluster.http.post("/abort", json={"request_id": "of-a"}, headers={"x-api-key": "a"})
    assert aborted.json()["aborted"] == ["of-a"]
    assert (await running).status_code == 499
    again = chat("a")
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 5)
    both = {"x-admin-key": "c", "x-api-key": "a"}
    of_b = await cluster.http.post("/abort", json={"request_id": "of-b"}, headers=both)
    assert of_b.json()["aborted"] == ["of-b"]
    both = {"authorization": "Bearer a", "x-admin-key": "c"}
    assert len((await cluster.http.post("/abort", json={"abort_all": True}, headers=both)).json()["aborted"]) == 3
    assert {(await one).status_code for one in (again, *others)} == {499}
    figures = (await cluster.http.get("/metrics?format=prometheus")).text
    labels = 'endpoint="/v1/chat/completions",model="",outcome="overloaded"'
    assert f"epd_requests_total{{{labels}}} 1.0\n" in figures
    assert 'endpoint="/abort",model=' not in figures  # that is no work


async def test_a_key_that_has_its_share_may_still_stop_answers(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(api_key=("a",), max_requests_per_key=1)
    key = {"x-api-key": "a"}

    async def say_hello(received: Received) -> None:
        await received.send(*cluster.pd.answer[:1])

    cluster.pd.script = say_hello
    turn: dict[str, Any] = {"messages": "hello", "session_id": 7}  # LMDeploy's form of a chat
    for index, (path, stop) in enumerate(
        (
            ("/generate", {"prompt": "", "instance_id": 7, "stop": True}),
            ("/v1/chat/interactive", {"prompt": "", "session_id": 7, "cancel": True}),
            ("/v1/chat/completions", turn | {"stop": True}),
        )
    ):
        running = asyncio.create_task(cluster.http.post("/v1/chat/completions", json=turn, headers=key))
        await cluster.pd.asked(index + 1)
        refused = [
            await cluster.http.post("/generate", json={"prompt": "x"}, headers=key),
            await cluster.http.post("/generate", json={"inputs": "x"}, headers=key),
            await cluster.http.post("/generate", json={"text": "x", "stop": True}, headers=key),
            await cluster.http.post("/generate", json={"prompt": "x", "max_tokens": 2, "stop": True}, headers=key),
            await cluster.http.post("/v1/chat/interactive", json={"prompt": "x"}, headers=key),
            await cluster.http.post("/v1/chat/completions", json={"messages": ask("x")}, headers=key),
            await cluster.http.post("/v1/completions", json={"prompt": "x"}, headers=key),
            await cluster.http.post(path, json=stop | {"prompt": "x" * 70_000}, headers=key),  # not read
        ]
        assert [one.status_code for one in refused] == [429] * len(refused)
        assert (await cluster.http.post(path, json=stop, headers=key)).status_code == 200
        assert (await running).status_code == 200
        assert len(cluster.pd.requests) == index + 1


async def test_pages_of_all_origins_may_call_by_default(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(api_key=("k",))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = await cluster.http.options("/v1/chat/completions", headers={"origin": PAGE} | asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for headers, status in (({"x_api_key": "k"}, 200), ({}, 401)):  # a page must be able to read why
        response = await get(cluster, "/v1/models", origin=PAGE, **headers)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, "*")
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in response.headers


async def test_origins_by_name(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(allowed_origins=(PAGE,), allow_credentials=True, allowed_methods=("POST",))
    response = await get(cluster, "/nowhere", origin=PAGE)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (404, PAGE)
    assert response.headers["access-control-allow-credentials"] == "true"
    stranger = await get(cluster, "/v1/models", origin="https://other.example")
    assert stranger.status_code == 200  # it is the browser that keeps it from the page
    assert "access-control-allow-origin" not in stranger.headers
    refused = await cluster.http.options(
        "/v1/models", headers={"origin": PAGE, "access-control-request-method": "DELETE"}
    )
    assert refused.status_code == 400


async def test_without_origins_nothing_is_said_of_them(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(allowed_origins=())
    assert "access-control-allow-origin" not in (await get(cluster, "/v1/models", origin=PAGE)).headers


async def test_pictures_come_from_allowed_hosts_alone(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(allowed_media_domains=("good.example",))
    picture = {"type": "image_url", "image_url": {"url": "http://other.example/x.png"}}
    body = {"messages": [{"role": "user", "content": [picture]}]}
    response = await cluster.http.post("/v1/chat/completions", json=body)
    assert_error(response.json(), 403, code="media_forbidden", param="messages[0].content[0]")
    assert response.json()["type"] == "permission_error"


@pytest.mark.parametrize("prefix", ["/epd", ""])
async def test_a_gateway_may_cut_its_path_off_or_not(start_cluster: ClusterFactory, prefix: str) -> None:
    cluster = await start_cluster(root_path="/epd", api_key=("k",))
    assert (await get(cluster, f"{prefix}/v1/models")).status_code == 401
    assert (await get(cluster, f"{prefix}/v1/models", x_api_key="k")).json()["data"][0]["id"] == cluster.name
    assert (await get(cluster, f"{prefix}/v1//models", x_api_key="k")).status_code == 200
    assert (await get(cluster, f"{prefix}/livez")).status_code == 200
    document = (await get(cluster, f"{prefix}/openapi.json")).json()
    assert document["servers"] == [{"url": "/epd"}]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"api_key": ("two words",)}, "--api-key: key 1"),
        ({"api_key": ("fine", "")}, "--api-key: key 2"),
        ({"api_key_file": Path("/nowhere")}, "--api-key-file"),
        ({"api_key_file": Path("/dev/null")}, "--api-key-file"),
        ({"max_requests_per_key": 3}, "--max-requests-per-key"),
        ({"api_key": ("k",), "max_requests_per_key": 0}, "--max-requests-per-key"),
        ({"allow_credentials": True}, "--allowed-origins"),
        ({"root_path": "epd"}, "--root-path"),
        ({"root_path": "/"}, "--root-path"),
        ({"root_path": "/v1"}, "--root-path /v1: /v1/"),
        ({"root_path": "/docs"}, "--root-path /docs: /docs"),
        ({"allowed_origins": ("app.example",)}, "--allowed-origins app.example"),
        ({"allowed_origins": ("https://app.example/",)}, "--allowed-origins https://app.example/"),
        ({"allowed_origins": ("https://App.example",)}, "--allowed-origins https://App.example"),
        ({"ssl_keyfile": Path("/dev/null")}, "--ssl-certfile"),
        ({"ssl_certfile": Path("/dev/null")}, "--ssl-certfile"),
        ({"ssl_certfile": Path("/nowhere")}, "--ssl-certfile"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(model: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        create_app(ProxyConfig(model=model, **fields))
    assert "two words" not in str(error.value)
