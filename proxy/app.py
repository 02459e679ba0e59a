"""The web application and the process around it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from epd import collector
from epd.config import ProxyConfig
from epd.errors import ClientError, ConfigError, EPDError, InternalError, InvalidRequest, ModelNotFound
from metastore.roster import Roster
from proxy.access import OPEN_PATHS, ApiKeys, Cors, Guard, document_keys
from proxy.api import generate, unified
from proxy.api.documentation import complete
from proxy.api.http import error_response
from proxy.api.lightllm import endpoints as lightllm
from proxy.api.lmdeploy import endpoints as lmdeploy
from proxy.api.messages import answer as messages_answer
from proxy.api.messages import endpoints as messages
from proxy.api.openai import endpoints as openai
from proxy.api.operations import control as operations
from proxy.api.operations import health, models, profiling, server_info, tokenize
from proxy.api.responses import endpoints as responses
from proxy.api.vectors import embeddings, score
from proxy.byte_budget import ByteBudget
from proxy.certificate import Renewals
from proxy.connection import Connection
from proxy.figures.metrics import CLIENT_CLOSED_REQUEST, Metrics
from proxy.randomness import random_piece
from proxy.request_context import ERROR_WORDS, OUTCOME, REQUEST_ID, REQUEST_ID_PATTERN, Outcome, note_client_left
from proxy.service import Service
from proxy.short_cuts import ShortCuts

log = logging.getLogger(__name__)

_DIALECTS = (
    openai,
    responses,
    messages,
    generate,
    lightllm,
    lmdeploy,
    unified,
    embeddings,
    score,
    tokenize,
    models,
    health,
    server_info,
    operations,
    profiling,
)
"""Modules with a `router`, and the structs that it is `DOCUMENTED` with."""

_ERROR_WORDS = {unified.PATH: unified.error_words} | dict.fromkeys(messages.PATHS, messages_answer.error_words)
"""Endpoints whose errors have a shape of their own, whoever raises them."""

_YOUNG_OBJECTS = 5000
"""A request makes several hundred, hardly any of them in cycles: to look after each one takes a tenth of its time."""
_LAST_WORDS_S = 5
"""Clients have so long to take the ends of their answers when the time for draining is over."""
KEEP_ALIVE_S = 65
"""Longer than load balancers keep idle connections, so that they close them, not we under a request."""
_BACKLOG = 2048
_FIRST_TRY_S = 1.0
"""A proxy that has just started does not refuse requests for want of workers that it could know of within so long."""
_LEADING_SLASHES = re.compile(r"^/+v1/+")
_EXPOSED_HEADERS = ("x-request-id", "retry-after", "x-should-retry", "www-authenticate")
"""Of an answer, what the scripts of other origins may read besides the usual."""


def create_app(config: ProxyConfig, roster: Roster | None = None) -> FastAPI:
    """The application of one proxy; its `state.service` is what handlers share.

    Args:
        config: of the proxy.
        roster: who the workers are; default: a new one, filled from the address lists.

    Raises:
        ConfigError: a file of the checkpoint or a flag is wrong.
    """
    service = Service(config, roster)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = _App(
        title="epd",
        description="Disaggregated serving of multimodal models.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = app.service = service
    for dialect in _DIALECTS:
        app.include_router(dialect.router)
    app.add_exception_handler(EPDError, _on_epd_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_client_disconnect)
    app.layers = _layers(app, config, service)
    _document_bodies(app, service, needs_key=bool(config.api_keys()))
    return app


class _App(FastAPI):
    """FastAPI behind the layers, so that what has a short way through them passes nothing of its own."""

    layers: ASGIApp
    service: Service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the layers."""
        scope["app"] = self
        await self.layers(scope, receive, send)

    async def behind_layers(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What FastAPI does."""
        await super().__call__(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """Without Starlette's outermost layer, whose answer to bugs is plain text: the edge has a better one."""
        stack = super().build_middleware_stack()
        assert isinstance(stack, ServerErrorMiddleware)
        return stack.app


def _layers(app: _App, config: ProxyConfig, service: Service) -> ASGIApp:
    """What every request passes, from the outside: CORS, so that pages may read errors too; the edge; the keys."""
    routes = [route for dialect in _DIALECTS for route in dialect.router.routes]
    _check_root(config.root_path, [*OPEN_PATHS, *(route.path for route in routes if isinstance(route, APIRoute))])
    service.metrics.paths = {route.path for route in routes if isinstance(route, APIRoute)}
    layers: ASGIApp = ShortCuts(app.behind_layers, routes=routes, handlers=app.exception_handlers)
    keys = ApiKeys(config.api_keys(), config.admin_key)
    if keys:
        layers = Guard(layers, keys=keys, max_requests=config.max_requests_per_key)
    layers = _Edge(layers, budget=service.bytes, metrics=service.metrics, root_path=config.root_path)
    if config.allowed_origins:
        layers = Cors(
            layers,
            allow_origins=config.allowed_origins,
            allow_credentials=config.allow_credentials,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            expose_headers=_EXPOSED_HEADERS,
        )
    return layers


def _check_root(root: str, paths: Sequence[str]) -> None:
    """Whether a gateway has cut the root off can be told only where no path of ours begins like it."""
    taken = next((path for path in paths if root and f"{path}/".startswith(f"{root}/")), None)
    if taken is not None:
        raise ConfigError(f"--root-path {root}: {taken} begins like that itself; have the gateway show another path")


def _document_bodies(app: FastAPI, service: Service, *, needs_key: bool) -> None:
    """Put the schemas of our structs, which FastAPI can't see, into /openapi.json, and where a key is needed."""
    generate = app.openapi

    @cache  # anybody may ask, and it takes a tenth of a second
    def openapi() -> dict[str, Any]:
        document = generate()
        kinds = [kind for dialect in _DIALECTS for kind in dialect.DOCUMENTED]
        complete(document, kinds, next(iter(service.named_models()), "model"))
        if needs_key:
            document_keys(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


# -- errors ----------------------------------------------------------------------------------------------------------


class MethodNotAllowed(ClientError):
    """The path exists, with other methods."""

    status = 405
    code = "method_not_allowed"


async def _on_epd_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EPDError)
    level = logging.INFO if isinstance(error, ClientError) else logging.WARNING
    log.log(level, "%s: %d %s", _route(request), error.status, _one_line(error.message))
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    route = _route(request)
    if error.status_code == 404:
        return error_response(ModelNotFound(f"There is no {route}; see /docs."))
    if error.status_code == 405:
        headers = MutableHeaders(error.headers)
        allowed = headers.get("allow", "other methods")
        response = error_response(MethodNotAllowed(f"{route}: this path takes {allowed}."))
        response.headers.update(headers)
        return response
    return error_response(InvalidRequest(str(error.detail)) if error.status_code < 500 else InternalError("A bug."))


def _route(request: Request) -> str:
    return f"{request.method} {_one_line(request.scope['path'])}"


def _one_line(text: str) -> str:
    """Clients choose paths, and parts of messages; a line of the log is one event."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return error_response(InvalidRequest(str(first.get("msg")), param=".".join(map(str, first.get("loc", ())))))


async def _on_client_disconnect(_: Request, __: Exception) -> Response:
    note_client_left()
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it


class _Edge:
    """The outermost layer: request ids, sloppy base URLs, bytes held, outcomes, and the last resort for bugs."""

    def __init__(self, app: ASGIApp, budget: ByteBudget, metrics: Metrics, root_path: str) -> None:
        self._app = app
        self._budget = budget
        self._metrics = metrics
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A base URL with a slash at its end makes clients ask for /v1//models.
        path = self._cut_root(scope["path"]) if self._root else scope["path"]
        scope["path"] = _LEADING_SLASHES.sub("/v1/", path) if "//" in path else path
        scope["root_path"] = self._root
        request_id = _request_id(scope)
        REQUEST_ID.set(request_id)
        arrived, outcome = time.perf_counter(), Outcome()
        OUTCOME.set(outcome)
        ERROR_WORDS.set(_ERROR_WORDS.get(scope["path"]))

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                outcome.status = message["status"]
                # Its body may have named it.
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", REQUEST_ID.get().encode())]
            return send(message)

        connection = Connection.of(scope)
        if connection is not None and send == connection.cycle.send:
            outcome.send = send_with_id
        try:
            with self._budget.lease():
                await self._app(scope, receive, send_with_id)
        except Exception:  # the edge of a request: whatever it was, the client is answered
            log.exception("bug in %s %s (request id %s)", scope["method"], scope["path"], request_id)
            error = InternalError(f"Internal error; please report it with the request id {request_id}.")
            if outcome.status:
                outcome.error = error
                raise  # too late for a status; the server cuts the connection
            await error_response(error)(scope, receive, send_with_id)
        finally:
            self._metrics.answered(scope, outcome, arrived)
            # The error's traceback leads to pictures, and the connection's timers know the outcome.
            outcome.error = outcome.send = None

    def _cut_root(self, path: str) -> str:
        """The path as routes know it. Gateways cut `--root-path` off or don't; both are right."""
        return path[len(self._root) :] if path.startswith(f"{self._root}/") else path


def _request_id(scope: Scope) -> str:
    """The client's own id when it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if re.fullmatch(REQUEST_ID_PATTERN, text):
                return text
    return random_piece().hex()


# -- process ---------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """Uvicorn that drains on signals and ends with exit code 0, instead of dying of the signal after all.

    While it drains it goes on listening: `/ready` says no, new requests are refused, answers under way go on.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Finish streams on SIGINT and SIGTERM; the second signal ends them, the third does not wait for clients."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Signals are for the main thread; tests run servers in others.
            with contextlib.suppress(RuntimeError, ValueError):
                loop.add_signal_handler(number, self._on_signal)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, once workers have been tried: what comes meanwhile waits in the listener's queue."""
        await self._service.until_workers_are_tried(_FIRST_TRY_S)
        await super().startup(sockets)

    def _on_signal(self) -> None:
        if self._draining is None:
            log.info("shutting down when all answers are given, in %g s at most", self._service.config.drain_timeout)
            self._draining = asyncio.create_task(self._drain(), name="drain")
        else:
            self.force_exit = self.should_exit
            self.should_exit = True

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True


def run_proxy(config: ProxyConfig) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code.

    Raises:
        ConfigError: a flag or file is wrong, or an address is in use.
    """
    code: int = uvloop.run(_serve(config))
    return code


async def _serve(config: ProxyConfig) -> int:
    app = create_app(config)
    service: Service = app.state.service
    listener = _listen(config.host, config.port)
    await service.start()  # before the lifespan, so that a wrong address is told as such
    host, port = listener.getsockname()[:2]
    if service.discovery is not None:
        service.discovery.register(host, port)
    models = ", ".join([config.model_name] * (config.model is not None) + [f"{root}/*" for root in config.models])
    scheme = "http" if config.ssl_certfile is None else "https"
    log.info("serving %s on %s://%s:%d", models, scheme, f"[{host}]" if ":" in host else host, port)
    server = _Server(
        uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            log_level="warning",  # its info says what ours says
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_LAST_WORDS_S,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        ),
        service,
    )
    collector.settle(_YOUNG_OBJECTS)
    server.config.load()  # makes the context for TLS
    renewals = None
    if config.ssl_certfile is not None and server.config.ssl is not None:
        files = Renewals(server.config.ssl, config.ssl_certfile, config.ssl_keyfile)
        renewals = asyncio.create_task(files.follow(), name="renewed certificates")
    await server.serve(sockets=[listener])
    if renewals is not None:
        renewals.cancel()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:  # OverflowError: not a port number
        listener.close()
        raise ConfigError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from error
    return listener
