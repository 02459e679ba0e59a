"""The table of endpoints in the README: each of the proxy's, and what it says of them is found out by asking."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from starlette.routing import Route

from epd.config import ProxyConfig
from epd.types import WorkerTask
from proxy.api.examples import EXAMPLES
from proxy.app import create_app
from tests.proxy.conftest import Cluster, ClusterFactory
from tests.proxy.test_contract import document_of, give_vectors_too

README = Path(__file__).resolve().parents[2] / "README.md"
KINDS = {WorkerTask.GENERATE: "generating", WorkerTask.EMBED: "embedding", WorkerTask.SCORE: "reward"}
STREAMS = ("text/event-stream", "application/octet-stream")
OURS = "operations"
"""The dialect of endpoints that are nobody else's."""

Endpoint = tuple[str, str]
"""Method and path."""


class Row(NamedTuple):
    dialect: str
    status: str
    notes: str


def table() -> dict[Endpoint, Row]:
    """The README's, by endpoint."""
    section = README.read_text().partition("\n## The API\n")[2]
    lines = [line for line in section.partition("\n\n#")[0].splitlines() if line.startswith("| `")]
    found: dict[Endpoint, Row] = {}
    for line in lines[: next((i for i, line in enumerate(lines) if "/" not in line.split("|")[1]), len(lines))]:
        endpoints, dialect, status, notes = (cell.strip() for cell in line.strip("|").split(" | "))
        for words in re.findall(r"`([A-Z ]+/[^`]*)`", endpoints):
            *methods, path = words.split(" ")
            for method in methods:
                assert (method, path) not in found, f"{method} {path} is there twice"
                found[method, path] = Row(dialect, status, notes)
    return found


def routes(model: Path) -> dict[Endpoint, Route]:
    """The application's, by endpoint."""
    app = create_app(ProxyConfig(model=model))
    return dict(endpoints_of(app.routes))


def endpoints_of(found: Any) -> Iterator[tuple[Endpoint, Route]]:
    for route in found:
        router = getattr(route, "original_router", None)  # newer FastAPIs keep included routers whole
        if router is not None:
            yield from endpoints_of(router.routes)
            continue
        for method in route.methods:
            yield (method, route.path.replace(":path}", "}")), route


def test_every_endpoint_is_there_and_no_other(model: Path) -> None:
    assert set(table()) == set(routes(model))


def test_dialects(model: Path) -> None:
    wanted = {endpoint: ", ".join(getattr(route, "tags", None) or [OURS]) for endpoint, route in routes(model).items()}
    assert {endpoint: row.dialect for endpoint, row in table().items()} == wanted
    assert all(row.notes for row in table().values())


@pytest.mark.parametrize("kind", KINDS)
async def test_statuses(start_cluster: ClusterFactory, model: Path, kind: WorkerTask) -> None:
    """`works`, `streams` where it answers in pieces if asked; `with … models` where not all kinds of models do it."""
    cluster = await start_cluster(task=kind)
    give_vectors_too(cluster)
    lies = []
    found, document = routes(model), await document_of(cluster)
    for endpoint, row in table().items():
        works, _, rest = row.status.partition(" with ")
        wanted = not rest or KINDS[kind] in rest
        answers, streams = await tried(cluster, endpoint, bodies_for(endpoint, found, document))
        if answers != wanted or (wanted and streams != ("streams" in works)):
            lies.append((*endpoint, row.status, {"answers": answers, "streams": streams}))
    assert not lies, "\n".join(map(str, lies))


def bodies_for(endpoint: Endpoint, found: dict[Endpoint, Route], document: Any) -> list[Any]:
    """Examples of its body, or of the endpoint that it is another name of."""
    handler = found[endpoint].endpoint
    for method, path in EXAMPLES:
        if found[method.upper(), path].endpoint is handler and endpoint[0] == method.upper():
            content = document["paths"][path][method]["requestBody"]["content"]["application/json"]
            return [example["value"] for example in content["examples"].values()]
    return []


async def tried(cluster: Cluster, endpoint: Endpoint, bodies: list[Any]) -> tuple[bool, bool]:
    """Whether an endpoint answers, and whether in pieces when asked for that, by any of its dialects."""
    method, path = endpoint
    path = path.replace("{model}", cluster.name)
    response = await cluster.http.request(method, path, json=bodies[0] if bodies else None)
    for body in bodies if response.is_success else ():
        pieces = await cluster.http.request(method, path, json=body | {"stream": True})
        if pieces.headers["content-type"].partition(";")[0] in STREAMS:
            return True, True
    return response.is_success, False
