"""How LightLLM's endpoints tell errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request

from epd.errors import EPDError
from proxy.api.http import error_body
from proxy.api.requests import service_of
from proxy.request_context import ERROR_WORDS


def use_native_errors(request: Request) -> None:
    """From here on errors have LightLLM's statuses, if the operator wants them so."""
    if service_of(request).config.lightllm_error_417:
        ERROR_WORDS.set(error_words)


def error_words(error: EPDError) -> tuple[int, dict[str, Any]]:
    """All errors are 417 there, except that something is busy."""
    status = 503 if error.retryable else 417
    return status, error_body(error) | {"code": status}


@contextmanager
def naming_native_fields() -> Iterator[None]:
    """Let errors of parts that all dialects share name the fields that they have here."""
    try:
        yield
    except EPDError as error:
        if error.param == "messages":
            error.param = "multimodal_params" if error.code == "request_too_large" else "inputs"
        raise
