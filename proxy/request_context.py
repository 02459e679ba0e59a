"""What work done for an HTTP request knows of it without being told. Tasks inherit it from whoever makes them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import msgspec
from starlette.types import Send

from epd.errors import EPDError

ErrorWords = Callable[[EPDError], tuple[int, dict[str, Any]]]
"""Status and body of an answer that is an error."""

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""As in the header X-Request-Id, the client's own or ours; empty outside of requests."""
REQUEST_ID_PATTERN = "[A-Za-z0-9._:-]{1,128}"
"""Of names that clients may give: harmless in headers and in logs."""

KEY_ID: ContextVar[str] = ContextVar("key_id", default="")
"""Whose request it is: the beginning of the API key's digest, the same at all proxies; empty: no keys are asked for."""

OVER_LIMIT: ContextVar[EPDError | None] = ContextVar("over_limit", default=None)
"""Why the request must not be worked on: its key has as many in work as it may. It may still stop one of them."""

ERROR_WORDS: ContextVar[ErrorWords | None] = ContextVar("error_words", default=None)
"""How the endpoint words its errors, those included that come before it is reached; None: as most do."""


class Outcome(msgspec.Struct, eq=False):
    """How a request ended, noted by whoever finds out: the status of a stream is sent before its failure."""

    model: str = ""
    """That it was for; empty where nothing reached the workers."""
    status: int = 0
    """Of the answer; 0: none was sent."""
    error: EPDError | None = None
    """That ended a stream."""
    client_left: bool = False
    send: Send | None = None
    """What hands the answer to the server, where nothing outside of it changes what it is given."""


OUTCOME: ContextVar[Outcome | None] = ContextVar("outcome", default=None)
"""Of the request; None outside of requests."""


def check_share() -> None:
    """Called by endpoints that also stop answers (`proxy.access.STOP_PATHS`), for requests that are work.

    Raises:
        TooManyOfKey: the API key has as many in work as it may.
    """
    if (error := OVER_LIMIT.get()) is not None:
        raise error


def note_model(name: str) -> None:
    """Workers get the request, for that model."""
    if (outcome := OUTCOME.get()) is not None:
        outcome.model = name


def note_stream_error(error: EPDError) -> None:
    """A stream ends with an error."""
    if (outcome := OUTCOME.get()) is not None:
        outcome.error = error


def note_client_left() -> None:
    """The client did not wait for the end."""
    if (outcome := OUTCOME.get()) is not None:
        outcome.client_left = True
