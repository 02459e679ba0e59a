"""API keys: which requests need one, which are good, and how many requests each may have in work; and other origins.

Open without a key are the paths in `OPEN_PATHS` (is it alive, what is it, its documents, its figures) and OPTIONS, as
browsers ask before they send keys. All others need one, so that a route that nobody thought of is closed.

Only digests are kept. Each comparison takes the same time for all keys, and neither keys nor their digests are logged.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Collection
from hashlib import sha256
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from epd.errors import EPDError, TooManyOfKey, Unauthorized
from proxy.api.http import error_response, header
from proxy.request_context import KEY_ID, OVER_LIMIT

OPEN_PATHS = frozenset(
    {
        *("/health", "/healthz", "/ready", "/readiness", "/livez", "/liveness", "/ping", "/check_health", "/version"),
        *("/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
    }
)
CONTROL_PATHS = frozenset({"/abort", "/start_profile", "/stop_profile"})
"""A key that has as many requests in work as it may must still be able to stop some."""
STOP_PATHS = frozenset({"/generate", "/v1/chat/interactive", "/v1/chat/completions"})
"""Where the body may say that an answer is to be stopped. These endpoints call `check_share` for everything else."""
_MAX_STOP_BYTES = 64 << 10
"""Of a key that has as many requests in work as it may, no larger bodies are read."""
_ID_LENGTH = 16


class ApiKeys:
    """The keys that are good. False when there are none, and everybody may ask.

    Args:
        keys: of clients.
        admin_key: of the operators, good for all that others are good for; it alone asks for no keys.
    """

    def __init__(self, keys: Collection[str], admin_key: str | None = None) -> None:
        self._digests = [_digest(key.encode()) for key in dict.fromkeys(keys)]
        self._admin = None if admin_key is None else _digest(admin_key.encode())

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, scope: Scope) -> str | None:
        """Whose key a request brings: an id, "" for the operators, None for no good key at all."""
        given: list[bytes] = []
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                given.append(_digest(value[7:].strip()))
            elif name in (b"x-api-key", b"x-admin-key"):
                given.append(_digest(value.strip()))
        found: str | None = None
        is_admin = False
        for one in given[:4]:  # more are nobody's mistake
            for digest in self._digests:
                if hmac.compare_digest(one, digest):
                    found = one.hex()[:_ID_LENGTH]
            if self._admin is not None and hmac.compare_digest(one, self._admin):
                is_admin = True
        return "" if is_admin else found


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


class Guard:
    """The layer that lets requests with a good key pass.

    Args:
        app: what is behind.
        keys: that are good.
        max_requests: that a key may have in work at once; None: as many as the proxy takes.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_requests: int | None = None) -> None:
        self._app = app
        self._keys = keys
        self._max_requests = max_requests
        self._in_work: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with 401 or 429."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        owner = self._keys.owner(scope)
        if owner is None:
            await _refuse(_unauthorized(scope), scope, receive, send)
            return
        KEY_ID.set(owner)
        if self._max_requests is None or not owner or scope["method"] != "POST" or scope["path"] in CONTROL_PATHS:
            await self._app(scope, receive, send)
        else:
            await self._count(owner, self._max_requests, scope, receive, send)

    async def _count(self, owner: str, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        if self._in_work[owner] >= limit:
            text = f"{limit} requests with this API key are in work already, which is its limit. Try again in a moment."
            error = TooManyOfKey(text)
            if not _may_stop(scope):
                await _refuse(error, scope, receive, send)
                return
            OVER_LIMIT.set(error)
            await self._app(scope, receive, send)
            return
        self._in_work[owner] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_work[owner] -= 1
            if not self._in_work[owner]:
                del self._in_work[owner]


class Cors(CORSMiddleware):
    """Starlette's layer; where all origins are allowed it stays out of the way of requests that name none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what browsers ask before, and tell them what pages may read."""
        if self.allow_all_origins and scope["type"] == "http" and not header(scope, b"origin"):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def document_keys(document: dict[str, Any]) -> None:
    """Say in an OpenAPI document where a key is needed, so that its page can ask for one."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{"bearer": []}, {"x-api-key": []}]
    for path, methods in document["paths"].items():
        if path in OPEN_PATHS:
            for operation in methods.values():
                operation["security"] = []


def _may_stop(scope: Scope) -> bool:
    """Whether the body is to be read, to see whether it stops an answer."""
    if scope["path"] not in STOP_PATHS:
        return False
    size = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return bool(size.isdigit()) and int(size) <= _MAX_STOP_BYTES


def _unauthorized(scope: Scope) -> Unauthorized:
    brought = any(name in (b"authorization", b"x-api-key", b"x-admin-key") for name, _ in scope["headers"])
    what = "That API key is wrong" if brought else "An API key is needed"
    return Unauthorized(f"{what}: send one of this server's as Authorization: Bearer KEY or x-api-key: KEY.")


async def _refuse(error: EPDError, scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(error)(scope, receive, send)
