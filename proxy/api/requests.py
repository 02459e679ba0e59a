"""What endpoints with a JSON body share: decoding, the deadline until workers have it, documentation."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Protocol, TypeVar

from fastapi import Request

from epd.errors import DeadlineExceeded, InvalidRequest
from proxy.api.documentation import EVENT, REF
from proxy.api.http import JSON, Client, Exchange, header, read_body
from proxy.api.json_body import Body, decode_body
from proxy.begun import Begun
from proxy.dispatch.dispatcher import Preparation
from proxy.models.served_model import ServedModel
from proxy.request_context import REQUEST_ID, REQUEST_ID_PATTERN
from proxy.service import Service
from proxy.timers import TimeLimit

T = TypeVar("T")


class _NamesModel(Protocol):
    @property
    def model(self) -> str | None: ...


NamingModel = TypeVar("NamingModel", bound=_NamesModel)

EVENTS = "text/event-stream"
"""Media type of server-sent events."""


def service_of(request: Request) -> Service:
    """What the application's handlers share."""
    service: Service = request.scope["app"].service
    return service


async def read_request(request: Request) -> Body:
    """The body as it came, within the limits of the server.

    Raises:
        ShuttingDown: nothing new is taken.
        InvalidRequest: the body is not said to be JSON.
        RequestTooLarge, RequestTimeout, Overloaded: see `read_body`.
    """
    service = service_of(request)
    service.dispatcher.check_open()
    _check_content_type(request)
    config = service.config
    return await read_body(request, config.max_body_bytes, config.request_timeout)


def is_admin(request: Request, admin_key: str | None) -> bool:
    """Whether a request brings the key of the operators, in one of the headers that keys come in."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = [request.headers.get(name, "") for name in ("x-admin-key", "x-api-key")]
    given.append(token.strip() if scheme.lower() == "bearer" else "")
    return admin_key is not None and any(hmac.compare_digest(one.encode(), admin_key.encode()) for one in given)


async def decoded(request: Request, kind: type[T]) -> T:
    """The body, within the limits of the server.

    Raises:
        ShuttingDown, RequestTooLarge, RequestTimeout, Overloaded, InvalidRequest: see `read_request` and `decode_body`.
    """
    return decode_body(await read_request(request), kind)


async def exchange(
    request: Request,
    kind: type[NamingModel],
    answer: Callable[[Client, ServedModel, NamingModel, float], Awaitable[None]],
) -> Exchange:
    """The exchange in which `answer(client, model, body, arrived)` answers, by the model that the body names.

    Args:
        request: of which nothing was read yet.
        kind: of its body.
        answer: `arrived` is `time.perf_counter()` of now.

    Raises:
        ModelNotFound, NoWorker: see `Service.model`.
        ShuttingDown, RequestTooLarge, RequestTimeout, Overloaded, InvalidRequest: see `decoded`.
    """
    arrived = time.perf_counter()
    body = await decoded(request, kind)
    model = service_of(request).model(body.model)
    return Exchange(lambda client: answer(client, model, body, arrived))


def _check_content_type(request: Request) -> None:
    """Refuse what forms and scripts of other web sites may send without asking first, and be as strict as vLLM."""
    said = header(request.scope, b"content-type")
    if said == JSON.encode():
        return
    given = said.decode("latin-1").partition(";")[0].strip().lower()
    if given != JSON and not (given.startswith("application/") and given.endswith("+json")):
        raise InvalidRequest(
            f"The header Content-Type is {given[:100] or 'missing'}; send Content-Type: {JSON} "
            f"(with curl: -H 'Content-Type: {JSON}')."
        )


def name_request(name: str | None) -> None:
    """Let /abort, logs and the header X-Request-Id of the answer call this request by the name that its body gives it.

    Raises:
        InvalidRequest: it is not harmless.
    """
    if name is None:
        return
    if not re.fullmatch(REQUEST_ID_PATTERN, name):
        raise InvalidRequest(f"request_id is not of the form {REQUEST_ID_PATTERN}.", param="request_id")
    REQUEST_ID.set(name)


class Deadline:
    """`with Deadline(…)`: bounds what happens before workers have the request by the time that it may take in all.

    Args:
        model: that it is for.
        arrived: `time.perf_counter()` when it came.
        limit_s: seconds that it may take; default: `--request-timeout`.
    """

    def __init__(self, model: ServedModel, arrived: float, limit_s: float | None = None) -> None:
        self._limit_s = limit_s or model.config.request_timeout
        self._timer = TimeLimit(arrived + self._limit_s - time.perf_counter())
        self._dispatcher = model.dispatcher
        self._preparation = Preparation(self._timer)

    def __enter__(self) -> None:
        self._timer.__enter__()
        self._dispatcher.preparing.add(self._preparation)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises DeadlineExceeded, or what the request was ended with (`Preparation.fail`)."""
        self._dispatcher.preparing.discard(self._preparation)
        ended_with = self._preparation.error
        try:
            self._timer.__exit__(kind, error, trace)
        except TimeoutError:
            over = DeadlineExceeded(f"The request was not ready for the workers within {self._limit_s:g} s.")
            raise ended_with or over from None
        if ended_with is not None and kind is None:  # it came too late to stop anything
            raise ended_with


async def in_time(model: ServedModel, arrived: float, work: Awaitable[T]) -> T:
    """What `work` returns, within a `Deadline` unless it returns at once, as most does. Arguments are those."""
    begun = Begun(work)
    if begun.is_done:
        return begun.result
    with Deadline(model, arrived):
        return await begun


def documented(body: type[Any], answer: type[Any], *, stream: str | None = None) -> dict[str, Any]:
    """What FastAPI can't see of an endpoint whose bodies are our structs.

    Args:
        body: of requests.
        answer: in one piece.
        stream: media type of answers in pieces; None: there are none.
    """

    def content(kind: type[Any]) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": REF.format(name=kind.__name__)}}}

    answers = content(answer) | ({stream: {"schema": EVENT}} if stream else {})
    return {
        "requestBody": {"required": True, "content": content(body)},
        "responses": {
            "200": {"description": "The answer, or a stream of events" if stream else "The answer", "content": answers}
        },
    }
