"""What work done for an HTTP request knows of it without being told. Tasks inherit it from whoever makes them."""

from __future__ import annotations

from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""As in the header X-Request-Id, the client's own or ours; empty outside of requests."""

KEY_ID: ContextVar[str] = ContextVar("key_id", default="")
"""Whose request it is: the beginning of the API key's digest, the same at all proxies; empty: no keys are asked for."""
