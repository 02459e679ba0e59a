"""What `/docs` says of native endpoints, whose bodies and answers have several shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxy.api.documentation import EVENT, REF


def native_documentation(
    *,
    bodies: Sequence[type[Any]],
    answers: Sequence[type[Any]] = (),
    lists_of: Sequence[type[Any]] = (),
    stream: str | None = None,
) -> dict[str, Any]:
    """For FastAPI's `openapi_extra`.

    Args:
        bodies: structs, of which a request has one.
        answers: structs, of which an answer in one piece has one.
        lists_of: or it is a list of one of those.
        stream: media type of answers in pieces; None: there are none.
    """
    shapes = [_ref(kind) for kind in answers] + [{"type": "array", "items": _ref(kind)} for kind in lists_of]
    content: dict[str, Any] = {"application/json": {"schema": _any_of(shapes)}} if shapes else {}
    if stream is not None:
        content[stream] = {"schema": EVENT}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _any_of([_ref(kind) for kind in bodies])}},
        },
        "responses": {"200": {"description": "The answer", "content": content}},
    }


def _ref(kind: type[Any]) -> dict[str, Any]:
    return {"$ref": REF.format(name=kind.__name__)}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
