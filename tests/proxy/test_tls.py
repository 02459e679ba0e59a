"""A proxy of its own that serves HTTPS and wants a key, and our own commands that must get in."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from epd.bench.http_client import HttpClient, ServerGone
from epd.cli import main
from epd.credentials import Credentials
from proxy.certificate import Renewals
from tests.tcp import TcpServer, connected


@dataclass
class Secured:
    """Where the proxy is, and the file that says whom to trust."""

    url: str
    ca_file: Path


@pytest.fixture(scope="module")
def secured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    flags = ("--model", model, "--host", "127.0.0.1", "--port", "0", "--ssl-certfile", folder / "server.pem")
    command = [sys.executable, "-m", "epd", "proxy", *map(str, flags)]
    environment = os.environ | {"EPD_API_KEY": "good,also-good"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        line = next(line for line in process.stderr if "serving" in line)
        reader = threading.Thread(target=process.stderr.read)  # so that the pipe never fills
        reader.start()
        yield Secured(line.split()[-1].replace("127.0.0.1", "localhost"), folder / "ca.pem")
        process.terminate()
        assert process.wait() == 0
        reader.join()
        watchdog.cancel()


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_ping_needs_no_key_and_no_certificate(secured: Secured, capsys: pytest.CaptureFixture[str]) -> None:
    assert secured.url.startswith("https://")
    assert run(capsys, "ping", secured.url)[0] == 0
    assert run(capsys, "ping", secured.url, "--ca-file", secured.ca_file)[0] == 0
    code, shown = run(capsys, "ping", secured.url.replace("localhost", "127.0.0.1"), "--ca-file", secured.ca_file)
    assert code == 1
    assert "certificate" in shown.lower()


def test_status_gets_in_with_key_and_certificate(
    secured: Secured, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = ("--ca-file", secured.ca_file)
    code, shown = run(capsys, "status", "--url", secured.url)
    assert code == 2
    assert "certificate" in shown.lower()
    code, shown = run(capsys, "status", "--url", secured.url, *trust)
    assert code == 2
    assert "--api-key" in shown
    code, shown = run(capsys, "status", "--url", secured.url, *trust, "--api-key", "also-good")
    assert code == 1  # there are no workers
    assert "No worker has registered" in shown
    monkeypatch.setenv("EPD_API_KEY", "good,also-good")
    assert run(capsys, "status", "--url", f"{secured.url}/v1", *trust)[0] == 1


def test_chat_gets_in_with_key_and_certificate(secured: Secured, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("chat", "--url", f"{secured.url}/v1", "--model", "m", "hello?")
    code, shown = run(capsys, *words)
    assert code == 2
    assert "certificate" in shown.lower()
    code, shown = run(capsys, *words, "--ca-file", secured.ca_file, "--api-key", "bad")
    assert code == 1
    assert "API key" in shown
    code, shown = run(capsys, *words, "--ca-file", secured.ca_file, "--api-key", "good")
    assert code == 1
    assert "'m' does not exist" in shown


async def test_a_renewed_certificate_is_taken_up(tmp_path: Path) -> None:
    authority, file = trustme.CA(), tmp_path / "server.pem"

    def renew(text: bytes | None = None) -> None:
        issued = authority.issue_cert("localhost").private_key_and_cert_chain_pem
        file.write_bytes(issued.bytes() if text is None else text)

    async def serial() -> str:
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        async with connected(server.port, ssl=trusting, server_hostname="localhost") as (_, writer):
            return str(writer.get_extra_info("peercert")["serialNumber"])

    async def hang_up(*_: object) -> None:
        pass

    renew()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    renewals = Renewals(context, file, None)
    async with TcpServer(hang_up, ssl=context) as server:
        first = await serial()
        assert not renewals.look()
        assert await serial() == first
        renew()
        assert renewals.look()
        second = await serial()
        assert second != first
        for broken in (b"half of it", None):
            renew(broken)
            assert renewals.look() is (broken is None)
            assert (await serial() == second) is (broken is not None)
        file.unlink()
        assert not renewals.look()
        await serial()


async def test_the_load_generator_gets_in_with_key_and_certificate(secured: Secured) -> None:
    for credentials, status in (
        (Credentials(ca_file=secured.ca_file), 401),
        (Credentials(ca_file=secured.ca_file, api_key="good"), 200),
    ):
        client = HttpClient(f"{secured.url}/v1", credentials)
        assert await client.request("GET", "/models") == status
        client.close()
    client = HttpClient(f"{secured.url}/v1", Credentials(api_key="good"))
    with pytest.raises(ServerGone):
        await client.request("GET", "/models")
    client.close()
