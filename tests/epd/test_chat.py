"""`epd chat` against servers that are not as they should be: one line that says what to do, never a traceback."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from epd.cli import main

MODELS = b'{"object":"list","data":[{"id":"m","object":"model"}]}'
CHUNK = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"hello"}}]}\n\n'
UNAUTHORIZED = b'{"error":{"message":"That API key is wrong","type":"authentication_error","code":"invalid_api_key"}}'


class Handler(BaseHTTPRequestHandler):
    models: ClassVar[tuple[int, str, bytes]] = (200, "application/json", MODELS)
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, kind, body = self.models
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Begin an answer, and hang up."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", "100000")
        self.end_headers()
        self.wfile.write(CHUNK)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("EPD_API_KEY", raising=False)
    monkeypatch.setattr(Handler, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_answer_that_breaks_off(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", f"{url}/v1", "hi"]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("hello", "\nepd: the connection ended before the answer did\n")


def test_the_url_needs_no_path(url: str) -> None:
    for given in (url, f"{url}/", f"{url}/v1", f"{url}/v1/"):
        main(["chat", "--url", given, "hi"])
    assert Handler.asked == ["/v1/models"] * 4


@pytest.mark.parametrize(
    ("models", "code", "told"),
    [
        ((200, "application/json", b'{"object":"list","data":[]}'), 2, "serves no model yet"),
        ((200, "text/html", b"<html></html>"), 2, "no server that speaks OpenAI's API"),
        ((401, "application/json", UNAUTHORIZED), 1, "wants an API key: give --api-key, or set EPD_API_KEY"),
    ],
)
def test_a_server_that_can_not_be_asked(
    url: str,
    models: tuple[int, str, bytes],
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Handler, "models", models)
    assert main(["chat", "--url", url, "hi"]) == code
    assert told in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error_of_ours(url: str) -> None:
    """As with `epd chat … | head -1`."""
    command = [sys.executable, "-m", "epd", "chat", "--url", url, "hi"]
    chat = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert chat.stdout is not None
    chat.stdout.close()
    _, told = chat.communicate(timeout=60)
    assert (chat.returncode, told) == (141, b"")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chat", "--temperature", "nan", "hi"], "--temperature nan"),
        (["chat", "--temperature=-1", "hi"], "--temperature -1"),
        (["chat", "--api-key", "schlüssel", "hi"], "--api-key"),
        (["status", "--api-key", "schlüssel"], "--api-key"),
        (["bench", "serve", "--base-url", "http://127.0.0.1:9/v1", "--api-key", "schlüssel"], "--api-key"),
    ],
)
def test_values_that_can_not_be_sent(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err
