"""The short way to the endpoints that have most of the work.

FastAPI looks a route up in every router, solves dependencies and opens exit stacks, which takes longer than answering.
An endpoint that takes nothing but the request needs none of that: a POST to its exact path goes straight to it, inside
all layers. Everything else, and the documentation, is FastAPI's.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.request_context import OUTCOME

Handler = Callable[[Request, Exception], Awaitable[Response]]


class ShortCuts:
    """The innermost layer.

    Args:
        app: what takes the other requests.
        routes: of the application; of two with the same path, the first one counts.
        handlers: what exceptions become, by their classes.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute], handlers: Mapping[Any, Any]) -> None:
        self._app = app
        self._handlers: Mapping[Any, Handler] = handlers
        self._routes: dict[str, APIRoute] = {}
        for route in routes:
            if isinstance(route, APIRoute) and "POST" in (route.methods or ()):
                self._routes.setdefault(route.path, route)
        self._routes = {path: route for path, route in self._routes.items() if _takes_the_request_alone(route)}
        self.paths = frozenset(self._routes)
        """To which there is a short way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"], scope["endpoint"], scope["path_params"] = route, route.endpoint, {}
        request = Request(scope, receive, send)
        try:
            response: Response = await route.endpoint(request)
            await response(scope, receive, send)
        except Exception as error:  # as Starlette does: what has no handler is raised
            handler = next((self._handlers[kind] for kind in type(error).__mro__ if kind in self._handlers), None)
            outcome = OUTCOME.get()
            if handler is None or (outcome is not None and outcome.status):  # too late for another answer
                raise
            answer = await handler(request, error)
            await answer(scope, receive, send)


def _takes_the_request_alone(route: APIRoute) -> bool:
    """Whether FastAPI would call the endpoint with the request and nothing else, and send what it returns as it is."""
    dependant = route.dependant
    others = (
        dependant.path_params, dependant.query_params, dependant.header_params, dependant.cookie_params,
        dependant.body_params, dependant.dependencies,
    )  # fmt: skip
    is_bare = list(inspect.signature(route.endpoint).parameters) == [dependant.request_param_name]
    returns = inspect.get_annotations(route.endpoint, eval_str=True).get("return")
    is_response = isinstance(returns, type) and issubclass(returns, Response)
    return is_bare and is_response and inspect.iscoroutinefunction(route.endpoint) and not any(others)
