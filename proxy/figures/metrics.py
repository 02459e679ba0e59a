"""What the proxy counts and measures of its requests. Plain numbers; `proxy.figures.prometheus` words them when asked.

An observation costs a search in a short list and two additions, as it happens for every step of every answer.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Container
from dataclasses import dataclass, field

from starlette.types import Scope

from epd.errors import ClientError, EPDError, Overloaded, RequestAborted
from epd.observability import Histogram
from proxy.access import CONTROL_PATHS
from proxy.request_context import Outcome

CLIENT_CLOSED_REQUEST = 499
"""The status, known from nginx, of requests whose client left before there was one."""
_UNKNOWN_ENDPOINT = "other"
_MAX_MODELS = 1000
_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"})


@dataclass
class ModelFigures:
    """Of the requests for one model that reached workers."""

    time_to_first_token: Histogram = field(default_factory=Histogram)
    """From the arrival of a request to its first token."""
    inter_token: Histogram = field(default_factory=Histogram)
    """Between two outputs of an answer; one may bring several tokens."""
    time_per_output_token: Histogram = field(default_factory=Histogram)
    """Of a whole answer, without its first token."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, those that a prefix cache had."""
    completion_tokens: int = 0
    """As made by workers, those behind a stop string included."""
    retries: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Work that one worker did not finish and another one got, by the worker's role and why."""


class Metrics:
    """Of one proxy since its start."""

    def __init__(self) -> None:
        self.paths: Container[str] = ()
        """Of the endpoints that there are, those without variables."""
        self.models: dict[str, ModelFigures] = {}
        self.request_seconds: defaultdict[tuple[str, str], Histogram] = defaultdict(Histogram)
        """From arrival to the last word, by model and endpoint, of requests that reached workers."""
        self.outcomes: Counter[tuple[str, str, str]] = Counter()
        """Requests for work by model, endpoint and how they ended."""
        self.http: Counter[tuple[str, str, int]] = Counter()
        """All HTTP requests by endpoint, method and status."""

    def model(self, name: str) -> ModelFigures:
        """Those of a model, by its name in the API."""
        figures = self.models.get(name)
        if figures is None:
            if len(self.models) >= _MAX_MODELS:
                name = _UNKNOWN_ENDPOINT
            figures = self.models.setdefault(name, ModelFigures())
        return figures

    def answered(self, scope: Scope, outcome: Outcome, arrived: float) -> None:
        """An HTTP request is over.

        Args:
            scope: of the request, after it was routed.
            outcome: how it ended.
            arrived: `time.perf_counter()` when it came.
        """
        endpoint = getattr(scope.get("route"), "path", None)
        if endpoint is None:  # refused before it was routed, or nobody's
            endpoint = scope["path"] if scope["path"] in self.paths else _UNKNOWN_ENDPOINT
        method = scope["method"] if scope["method"] in _METHODS else _UNKNOWN_ENDPOINT
        self.http[endpoint, method, outcome.status or CLIENT_CLOSED_REQUEST] += 1
        if method == "POST" and endpoint != _UNKNOWN_ENDPOINT and endpoint not in CONTROL_PATHS:
            self.outcomes[outcome.model, endpoint, name_of(outcome)] += 1
        if outcome.model:
            self.request_seconds[outcome.model, endpoint].observe((time.perf_counter() - arrived) * 1000)


def name_of(outcome: Outcome) -> str:
    """One word for how a request ended: ok, aborted, client_gone, overloaded, client_error or server_error."""
    if outcome.error is not None:
        return _name_of_error(outcome.error)
    if outcome.client_left or not outcome.status:
        return "client_gone"
    if outcome.status == RequestAborted.status:
        return "aborted"
    if outcome.status == Overloaded.status:
        return "overloaded"
    if outcome.status >= 500:
        return "server_error"
    return "client_error" if outcome.status >= 400 else "ok"


def _name_of_error(error: EPDError) -> str:
    if isinstance(error, RequestAborted):
        return "aborted"
    if isinstance(error, Overloaded):
        return "overloaded"
    return "client_error" if isinstance(error, ClientError) else "server_error"
