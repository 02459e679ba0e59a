"""/openapi.json tells the truth: what it documents is answered as it says, and every field says what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from epd.types import FinishReason, WorkerTask
from proxy.api.documentation import ErrorBody, operations
from proxy.api.examples import EXAMPLES
from proxy.api.field_descriptions import FIELD_DESCRIPTIONS
from tests.proxy.conftest import Cluster, ClusterFactory
from tests.proxy.fakes import Received

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
MODES = {"as documented": GenerationMode.POSITIVE, "not as documented": GenerationMode.NEGATIVE}
EXAMPLES_EACH = {GenerationMode.POSITIVE: 8, GenerationMode.NEGATIVE: 4}
SECONDS_EACH = 20


def give_vectors_too(cluster: Cluster) -> None:
    """Have the fake worker answer what wants no tokens."""
    answer = cluster.pd.script

    async def script(received: Received) -> None:
        if received.request.pooling is None:
            await answer(received)
        else:
            await received.send(finish=FinishReason.STOP, pooled=[1.0])

    cluster.pd.script = script


async def document_of(cluster: Cluster) -> Any:
    return (await cluster.http.get("/openapi.json")).json()


@pytest.mark.parametrize("mode", MODES)
async def test_schemathesis(cluster: Cluster, mode: str) -> None:
    """Random requests: nothing is a server's error, nothing comes that is not documented."""
    give_vectors_too(cluster)
    document = await document_of(cluster)
    problems = await asyncio.to_thread(lambda: list(tried(document, cluster, MODES[mode])))
    assert not problems, "\n\n".join(problems)


def tried(document: Any, cluster: Cluster, mode: GenerationMode) -> Iterator[str]:
    """Problems of all operations."""
    schema: Any = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(modes=[mode])
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not operation.body:  # nothing can be wrong
            continue
        try:
            try_operation(operation, cluster, mode)
        except (Exception, FailureGroup) as error:
            parts = error.exceptions if isinstance(error, FailureGroup) else [error]
            yield "\n".join(f"{operation.label}: {type(part).__name__} {str(part)[:2000]}" for part in parts)


def try_operation(operation: Any, cluster: Cluster, mode: GenerationMode) -> None:
    @seed(1)
    @settings(
        max_examples=EXAMPLES_EACH[mode],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_it(case: Any) -> None:
        if isinstance(case.body, dict):
            for name in ("model", "model_id"):
                if name in case.body:  # else hardly any request gets beyond it
                    case.body[name] = cluster.name
        response = case.call(base_url=cluster.url, timeout=SECONDS_EACH)
        case.validate_response(response, checks=CHECKS)

    try_it()


async def test_every_field_says_what_it_is(cluster: Cluster) -> None:
    schemas = (await document_of(cluster))["components"]["schemas"]
    silent = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, found in schema.get("properties", {}).items()
        if not found.get("description")
    ]
    assert not silent
    names = {f"{name}.{field}" for name, schema in schemas.items() for field in schema.get("properties", {})}
    names |= {field.partition(".")[2] for field in names}
    assert set(FIELD_DESCRIPTIONS) <= names, "of fields that are gone"


async def test_every_operation_says_what_it_takes_and_what_may_go_wrong(cluster: Cluster) -> None:
    document = await document_of(cluster)
    with_bodies = set()
    for path, method, operation in operations(document):
        assert operation["description"], (path, method)
        assert operation["tags"], (path, method)
        statuses = {"400", "401", "404", "429", "500", "503"}
        if "requestBody" in operation:
            with_bodies.add((method, path))
            statuses |= {"403", "408", "409", "413", "422", "499", "502", "504"}
            assert operation["requestBody"]["content"]["application/json"]["examples"], (path, method)
        assert statuses <= set(operation["responses"]), (path, method)
        assert all(response["description"] for response in operation["responses"].values())
    assert with_bodies == set(EXAMPLES)
    assert set(ErrorBody.__struct_fields__) <= set((await cluster.http.get("/nowhere")).json())


def task_of(path: str) -> WorkerTask:
    return WorkerTask.SCORE if path in ("/get_score", "/v1/score", "/v1/rerank") else WorkerTask.GENERATE


@pytest.mark.parametrize("task", [WorkerTask.GENERATE, WorkerTask.SCORE])
async def test_examples_are_answered(start_cluster: ClusterFactory, task: WorkerTask) -> None:
    cluster = await start_cluster(task=task, encoders=int(task is WorkerTask.GENERATE))
    give_vectors_too(cluster)
    document = await document_of(cluster)
    tried = 0
    for path, method, operation in operations(document):
        if "requestBody" not in operation or task_of(path) is not task:
            continue
        for name, example in operation["requestBody"]["content"]["application/json"]["examples"].items():
            response = await cluster.http.request(method, path, json=example["value"])
            assert response.status_code == 200, (path, name, response.text)
            media = response.headers["content-type"].partition(";")[0]
            assert media in operation["responses"]["200"]["content"], (path, name, media)
            tried += 1
    assert tried >= 3
