"""`epd status`: the live roster of a cluster as a table, once or again and again.

Exit codes: 0 all is well, 1 a role is missing or a worker is not as it should be, 2 nobody answers.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import msgspec

from epd.access_options import API_KEY_VARIABLE
from epd.cluster_view import ClusterView, WorkerView
from epd.credentials import Credentials
from epd.errors import ConfigError
from epd.status_store import read_roster
from metastore.base import MetastoreError
from metastore.config import MetastoreConfig

DEFAULT_URL = "http://127.0.0.1:5580"
EXIT_OK, EXIT_DEGRADED, EXIT_UNREACHABLE = 0, 1, 2
_TIMEOUT_S = 5.0
_LEAST_WIDTH = 80
_LONGEST_ADDRESS = 40
_SHORTEST_ADDRESS = 18
_MAX_BYTES = 8 << 20
_NO_CREDENTIALS = Credentials()
_CLEAR = "\x1b[H\x1b[2J"
_UNKNOWN = "–"
_HEADINGS = ("ROLE", "ADDRESS", "STATE", "AGE", "RUN", "WAIT", "KV", "CACHE", "ERRORS", "MODEL")
_ADDRESS = _HEADINGS.index("ADDRESS")
_TO_THE_RIGHT = {"AGE", "RUN", "WAIT", "KV", "CACHE", "ERRORS"}


@dataclass(frozen=True, kw_only=True)
class StatusQuery:
    """Whom to ask, and how to show the answer."""

    url: str = DEFAULT_URL
    """Of a proxy, with or without `/v1`."""
    metastore: MetastoreConfig | None = None
    """Where to look instead of asking a proxy."""
    watch: float | None = None
    """Seconds between two looks; None: look once."""
    json: bool = False
    """Print the roster as JSON."""
    credentials: Credentials = Credentials()
    """For the proxy."""

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise ConfigError(f"--url {self.url}: want http://host:port")

    @property
    def source(self) -> str:
        """Who is asked, for people."""
        return self.url if self.metastore is None else f"metastore {self.metastore.safe_address}"


class Unreachable(Exception):
    """Nobody answers, or it is no proxy of ours."""


def show_status(query: StatusQuery) -> int:
    """Print the roster, once or until Ctrl-C. Returns the exit code, that of the last look."""
    code = EXIT_UNREACHABLE
    try:
        while True:
            code = _look(query)
            if query.watch is None:
                return code
            time.sleep(query.watch)
    except KeyboardInterrupt:
        return code


def _look(query: StatusQuery) -> int:
    try:
        view = _ask_proxy(query) if query.metastore is None else _read_metastore(query.metastore)
    except Unreachable as error:
        _clear_screen(query)
        print(f"epd: {error}", file=sys.stderr, flush=True)
        return EXIT_UNREACHABLE
    width = max(_LEAST_WIDTH, shutil.get_terminal_size((120, 24)).columns)
    text = msgspec.json.encode(view).decode() if query.json else format_view(view, query.source, width)
    _clear_screen(query)
    print(text, flush=True)
    return EXIT_OK if view.status == "ok" else EXIT_DEGRADED


def _ask_proxy(query: StatusQuery) -> ClusterView:
    try:
        return msgspec.json.decode(fetch(query.url, query.credentials), type=ClusterView)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreachable(f"{query.url} is no proxy of this version: {error}") from error


def _read_metastore(config: MetastoreConfig) -> ClusterView:
    try:
        return asyncio.run(read_roster(config, _TIMEOUT_S))
    except (MetastoreError, TimeoutError) as error:
        reason = str(error) or f"no answer within {_TIMEOUT_S:g} s"
        raise Unreachable(f"the metastore {config.safe_address} can't be read: {reason}") from error


def _clear_screen(query: StatusQuery) -> None:
    if query.watch is not None and not query.json and sys.stdout.isatty():
        print(_CLEAR, end="")


def fetch(url: str, credentials: Credentials = _NO_CREDENTIALS) -> bytes:
    """The body of `GET /cluster`.

    Raises:
        ConfigError: a file of the credentials is wrong.
        Unreachable: no such answer; says why.
    """
    address = url.rstrip("/").removesuffix("/v1") + "/cluster"
    try:
        with httpx.stream(
            "GET",
            address,
            headers=credentials.headers(),
            timeout=_TIMEOUT_S,
            trust_env=False,
            verify=credentials.tls() if address.startswith("https:") else False,
        ) as response:
            if response.status_code == httpx.codes.UNAUTHORIZED:
                raise Unreachable(f"{address} wants a good API key: give --api-key, or set {API_KEY_VARIABLE}")
            if response.status_code != httpx.codes.OK:
                raise Unreachable(f"{address} answers {response.status_code}: is that a proxy of this version?")
            body = b""
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _MAX_BYTES:
                    raise Unreachable(f"{address} answers more than {_MAX_BYTES} bytes: is that a proxy?")
            return body
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise Unreachable(
            f"no proxy answers at {url} ({reason}): start a cluster with `epd up`, or give --url"
        ) from error


# -- the table ---------------------------------------------------------------------------------------------------------


def format_view(view: ClusterView, source: str, width: int) -> str:
    """Headline, table, and one line for each thing that is wrong; lines of the table fit into `width` columns."""
    head = f"{_headline(view)}   {source}"
    if view.uptime_s:
        requests = f"{view.requests} request{'' if view.requests == 1 else 's'} in work"
        head += f": {requests}, up {format_age(view.uptime_s)}"
    rows = [_HEADINGS, *(_row(worker) for worker in view.workers)]
    lines = [head, "", *_align(rows, width)]
    if not view.workers:
        lines = [head, "", "No worker has registered."]
    if view.left_out:
        lines.append(f"… and {view.left_out} more")
    problems = _problems(view)
    return "\n".join([*lines, "", *problems] if problems else lines)


def _headline(view: ClusterView) -> str:
    missing = any(model.missing for model in view.models)
    unwell = sum(1 for worker in view.workers if worker.problem)
    if missing or not view.models:
        return "DEGRADED"
    return f"{unwell} of {len(view.workers)} workers need attention" if unwell else "ok"


def _problems(view: ClusterView) -> list[str]:
    lines = [
        f"! {model.name}: no {_role_in_words(role)} takes requests, so {_consequence(role)}"
        for model in view.models
        for role in model.missing
    ]
    lines += [
        f"! {_role_in_words(worker.role)} {_short_address(worker.address)}: {worker.problem}"
        for worker in view.workers
        if worker.problem
    ]
    return lines


def _role_in_words(role: str) -> str:
    return {"pd": "prefill-decode worker"}.get(role, role)


def _consequence(role: str) -> str:
    return "pictures are refused (503)" if role == "encoder" else "requests are refused (503)"


def _row(worker: WorkerView) -> tuple[str, ...]:
    is_up = worker.state != "down"
    return (
        worker.role,
        _short_address(worker.address),
        worker.state,
        format_age(worker.age_s),
        str(worker.running) if is_up else _UNKNOWN,
        str(worker.waiting) if is_up else _UNKNOWN,
        _percent(worker.kv_use),
        _percent(worker.cache_hit_rate),
        str(worker.errors) if is_up and worker.errors is not None else _UNKNOWN,
        worker.model or _UNKNOWN,
    )


def _short_address(address: str) -> str:
    """As in the flags: paths for Unix sockets, host:port for TCP."""
    return _cut_left(address.removeprefix("tcp://").removeprefix("ipc://"), _LONGEST_ADDRESS)


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{100 * share:.0f}%"


def format_age(seconds: float | None) -> str:
    """Short: 42s, 7m, 3h05m, 12d."""
    if seconds is None:
        return _UNKNOWN
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 2 * 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d"


def _align(rows: list[tuple[str, ...]], width: int) -> list[str]:
    """Aligned columns. Where lines are too long the gaps give way, then addresses from their left, then the models."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= width else " "
    excess = max(0, sum(widths) + len(gap) * (len(widths) - 1) - width)
    widths[_ADDRESS] = max(min(_SHORTEST_ADDRESS, widths[_ADDRESS]), widths[_ADDRESS] - excess)
    lines = []
    for row in rows:
        cells = [
            _cut_left(cell, size).rjust(size) if heading in _TO_THE_RIGHT else _cut_left(cell, size).ljust(size)
            for cell, size, heading in zip(row, widths, _HEADINGS, strict=True)
        ]
        line = gap.join(cells).rstrip()
        lines.append(line if len(line) <= width else line[: width - 1] + "…")
    return lines


def _cut_left(text: str, size: int) -> str:
    return text if len(text) <= size else "…" + text[len(text) - size + 1 :]
