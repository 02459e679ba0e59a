from __future__ import annotations

from pathlib import Path

from tests.redis_server import redis_server


def test_it_is_killed_started_again_and_flushed(tmp_path: Path) -> None:
    with redis_server(tmp_path, password="secret") as server:
        assert server.url == f"redis://:secret@127.0.0.1:{server.port}/0"
        server.run("SET", "key", "value")
        assert server.run("GET", "key") == "value"
        server.flush()
        assert server.run("GET", "key") == ""
        server.run("SET", "key", "value")
        server.restart()
        assert server.run("GET", "key") == ""
    assert server.popen is not None
    assert server.popen.poll() is not None
