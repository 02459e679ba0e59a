"""What /openapi.json has besides what FastAPI makes of the routes: our structs, errors, examples, words for fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from proxy.api.examples import EXAMPLES
from proxy.api.field_descriptions import FIELD_DESCRIPTIONS

REF = "#/components/schemas/{name}"
EVENT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "JSON, or where the dialect ends so, [DONE]"},
        "event": {"type": "string", "description": "Its kind, where the dialect has kinds"},
    },
    "required": ["data"],
}
"""Schema of one event of a stream."""
OPERATION_KEYS = frozenset({"get", "post", "head", "put", "delete", "patch", "options"})


class ErrorObject(msgspec.Struct):
    """An error as OpenAI has it."""

    message: Annotated[str, Meta(description="In words, for people")]
    type: Annotated[str, Meta(description="invalid_request_error, authentication_error, server_error, …")]
    param: Annotated[str | None, Meta(description="The field that is wrong")]
    code: Annotated[str | None, Meta(description="What went wrong, in a word")]


class ErrorBody(msgspec.Struct):
    """An error in the words of all dialects: OpenAI's object, with the flat keys of others beside it."""

    error: Annotated[ErrorObject, Meta(description="As OpenAI has it")]
    object: Annotated[str, Meta(description="error")]
    message: Annotated[str, Meta(description="As in error")]
    type: Annotated[str, Meta(description="As in error")]
    code: Annotated[int, Meta(description="The status")]
    param: Annotated[str | None, Meta(description="As in error")]


_ERRORS = {
    400: "The request is wrong; param names the field",
    401: "An API key is needed, or this one is wrong",
    403: "A picture from where none may come, or what only operators may do",
    404: "There is no such model",
    408: "The body did not arrive in time",
    409: "The session is busy with another turn",
    413: "The body is too large",
    422: "A picture can't be had from where it is said to be",
    429: "Too much at once; the header retry-after tells when to come back",
    499: "Somebody ended the request with /abort",
    500: "A bug",
    502: "A worker failed",
    503: "Nobody to do it now; the header retry-after tells when to come back",
    504: "It took longer than it may",
}
_WITHOUT_BODY = (400, 401, 404, 429, 500, 503)


def complete(document: dict[str, Any], kinds: Iterable[type[Any]], model: str) -> None:
    """Add to a document of FastAPI what it can't see.

    Args:
        document: changed.
        kinds: structs whose schemas it refers to, besides those of errors.
        model: name of one that examples can be sent to.
    """
    _, schemas = msgspec.json.schema_components([*kinds, ErrorBody], ref_template=REF)
    known = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nobody gets to see
        known.pop(name, None)
    known.update(schemas)
    for path, method, operation in operations(document):
        _add_errors(operation)
        if (method, path) in EXAMPLES:
            content = operation["requestBody"]["content"]["application/json"]
            examples = EXAMPLES[method, path].items()
            content["examples"] = {name: {"value": _for_model(body, model)} for name, body in examples}
    for name, schema in known.items():
        _describe(name, schema)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and operation of each."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method in OPERATION_KEYS:
                yield path, method, operation


def _add_errors(operation: dict[str, Any]) -> None:
    """Those of all endpoints, in the words of the endpoint where it has its own."""
    responses = operation["responses"]
    if responses.get("422", {}).get("description") == "Validation Error":
        del responses["422"]
    shared = {"application/json": {"schema": {"$ref": REF.format(name=ErrorBody.__name__)}}}
    content = responses.get("400", {}).get("content", shared)
    for status in _ERRORS if "requestBody" in operation else _WITHOUT_BODY:
        responses.setdefault(str(status), {"description": _ERRORS[status], "content": content})


def _for_model(body: dict[str, Any], model: str) -> dict[str, Any]:
    return {key: model if key in ("model", "model_id") else value for key, value in body.items()}


def _describe(name: str, schema: dict[str, Any]) -> None:
    for field, found in schema.get("properties", {}).items():
        described = FIELD_DESCRIPTIONS.get(f"{name}.{field}", FIELD_DESCRIPTIONS.get(field))
        if described and "description" not in found:
            found["description"] = described
