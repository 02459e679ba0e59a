"""`epd status`: what it prints, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from epd.cli import main
from epd.cluster_view import ClusterView, ModelView, WorkerView
from epd.messages import PROTOCOL_VERSION, Load, WorkerInfo
from epd.status import format_age, format_view
from epd.types import WorkerRole, WorkerState
from metastore.base import PROXY_ROLE, Record
from metastore.config import MetastoreConfig
from metastore.connect import make_metastore
from tests.ports import free_port
from tests.redis_server import redis_server

ENCODER = WorkerView(role="encoder", address="tcp://127.0.0.1:7001", model="m", state="ready", age_s=42, errors=3)
PD = WorkerView(
    role="pd",
    address="ipc:///tmp/a-folder-with-a-long-name/prefill_decode_0",
    model="m",
    state="draining",
    age_s=3 * 3600 + 300,
    running=12,
    waiting=34,
    kv_used_blocks=1,
    kv_total_blocks=4,
    cache_hits=9,
    cache_queries=10,
)
DOWN = WorkerView(role="encoder", address="tcp://[::1]:7002", model="", state="down", problem="silent for 2 s")


def view(*workers: WorkerView, missing: tuple[str, ...] = ()) -> ClusterView:
    models = (ModelView(name="m", missing=missing),)
    status = "degraded" if missing or any(worker.problem for worker in workers) else "ok"
    return ClusterView(status=status, version="1", uptime_s=7, requests=1, models=models, workers=workers)


@contextmanager
def server(body: bytes, status: int = 200) -> Iterator[str]:
    """An HTTP server that answers every GET alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def test_table_has_each_worker_with_its_figures() -> None:
    head, _, titles, encoder, pd = format_view(view(ENCODER, PD), "http://x", 120).splitlines()
    assert head == "ok   http://x: 1 request in work, up 7s"
    assert titles.split() == ["ROLE", "ADDRESS", "STATE", "AGE", "RUN", "WAIT", "KV", "CACHE", "ERRORS", "MODEL"]
    assert encoder.split() == ["encoder", "127.0.0.1:7001", "ready", "42s", "0", "0", "–", "–", "3", "m"]
    assert pd.split()[2:] == ["draining", "3h05m", "12", "34", "25%", "90%", "0", "m"]


@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_into_the_terminal(width: int) -> None:
    lines = format_view(view(ENCODER, PD, DOWN), "http://x", width).splitlines()
    table = lines[2:6]
    assert all(len(line) <= width for line in table)
    assert "/prefill_decode_0 draining" in " ".join(table[2].split()), "an address loses its beginning, not its end"


def test_what_is_wrong_is_said_in_words() -> None:
    text = format_view(view(DOWN, PD, missing=("encoder",)), "http://x", 100)
    assert text.startswith("DEGRADED")
    assert "! m: no encoder takes requests, so pictures are refused (503)" in text
    assert "! encoder [::1]:7002: silent for 2 s" in text
    assert "No worker" in format_view(view(missing=("pd",)), "http://x", 100)


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (0, "0s"), (61, "1m"), (86400, "24h00m"), (3e5, "3d")])
def test_ages_are_short(seconds: float | None, text: str) -> None:
    assert format_age(seconds) == text


def test_exit_code_tells_well_degraded_and_unreachable(capsys: pytest.CaptureFixture[str]) -> None:
    for answer, code in ((view(ENCODER, PD), 0), (view(PD, missing=("encoder",)), 1), (view(DOWN, ENCODER, PD), 1)):
        with server(msgspec.json.encode(answer)) as url:
            assert main(["status", "--url", f"{url}/v1/"]) == code
            assert main(["status", "--url", url, "--json"]) == code
            assert msgspec.json.decode(capsys.readouterr().out.splitlines()[-1], type=ClusterView) == answer
    assert main(["status", "--url", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "no proxy answers" in capsys.readouterr().err


def record(role: WorkerRole, address: str, **fields: Any) -> Record:
    worker = WorkerInfo(role=role, address=address, incarnation="1", model="0123456789abcdef", dtype="x", **fields)
    return Record(
        role=role.value,
        address=address,
        incarnation="1",
        protocol_version=PROTOCOL_VERSION,
        worker=worker,
        load=Load(running=3),
        uptime_s=61.0,
    )


def test_roster_in_the_metastore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = record(WorkerRole.ENCODER, "tcp://127.0.0.1:7001", served_model_name="seen")
    pd = record(WorkerRole.PREFILL_DECODE, "tcp://127.0.0.1:7002", served_model_name="seen", state=WorkerState.DRAINING)
    other = record(WorkerRole.PREFILL_DECODE, "tcp://127.0.0.1:7003", served_model_name="seen")
    proxy = Record(role=PROXY_ROLE, address="http://h:1", incarnation="1", protocol_version=PROTOCOL_VERSION)

    async def register(url: str, *records: Record) -> None:
        store = make_metastore(MetastoreConfig(address=url))
        for index, one in enumerate(records):
            assert await store.put(msgspec.structs.replace(one, token=index + 1), 60.0)
        await store.close()

    with redis_server(tmp_path, password="secret") as redis:
        flags = ["status", "--metastore-client-config", json.dumps({"metastore_address": redis.url})]
        assert main(flags) == 1
        assert "No worker has registered" in capsys.readouterr().out
        asyncio.run(register(redis.url, encoder, pd))
        assert main(flags) == 1
        assert "seen: no prefill-decode worker takes requests" in capsys.readouterr().out
        asyncio.run(register(redis.url, encoder, pd, other, proxy))
        assert main(flags) == 0
        head, _, _, *rows = capsys.readouterr().out.splitlines()
        assert head.startswith("ok   metastore redis://***@127.0.0.1")
        assert [row.split()[:3] for row in rows] == [
            ["encoder", "127.0.0.1:7001", "ready"],
            ["pd", "127.0.0.1:7002", "draining"],
            ["pd", "127.0.0.1:7003", "ready"],
            ["proxy", "http://h:1", "ready"],
        ]
        assert rows[1].split()[3:] == ["1m", "3", "0", "–", "–", "–", "seen"]
        redis.kill()
        assert main(flags) == 2
        told = capsys.readouterr().err
        assert "can't be read" in told
        assert "secret" not in told


@pytest.mark.parametrize(("body", "status"), [(b"nonsense", 200), (b"[]", 200), (b"\xff", 200), (b"{}", 404)])
def test_what_is_no_proxy_is_told(body: bytes, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with server(body, status) as url:
        assert main(["status", "--url", url]) == 2
    assert "proxy of this version" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--watch", "0"], ["--watch", "nan"], ["--url", "nowhere"], ["--url", "http://"]])
def test_bad_flags_are_named(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
