"""Pictures from all kinds of URLs, within limits."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import random
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from epd.errors import (
    ConfigError,
    EPDError,
    InvalidImage,
    InvalidRequest,
    MediaForbidden,
    MediaUnavailable,
    RequestTooLarge,
)
from proxy.media.file import read_file_url
from proxy.media.http import Domains, HttpFetcher, is_allowed, parse_networks
from proxy.media.loader import ImageSource, MediaLimits, MediaLoader, content_key, count_pixels, parse_data_url
from tests.proxy.conftest import data_url, png
from tests.tcp import TcpServer

PNG = png()
BASE64 = base64.b64encode(PNG).decode()


# -- data: -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/png;BASE64,{BASE64}",
        f"data:text/html;charset=utf-8;base64,{BASE64}",  # the label is not believed
        f"data:;base64,{BASE64}",
        f"data:image/png;base64,{BASE64[:20]}\n {BASE64[20:]}\r\n",
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    ],
)
def test_data_urls(url: str) -> None:
    assert parse_data_url(url, 1 << 20) == PNG


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:,",
        "data:image/png;base64,!!!!",
        f"data:image/png;base64,{BASE64.rstrip('=')}A===",
        "data:image/png;base64,QUJ",
        "data:image/png;base64,-_-_",
        "data:image/png;base64,QQ==QQ==",
        "data:image/png;base64,日本日本",
    ],
)
def test_malformed_data_urls(url: str) -> None:
    with pytest.raises(InvalidImage):
        parse_data_url(url, 1 << 20)


@pytest.mark.parametrize("url", [data_url(bytes(101)), "data:," + "a" * 101, "data:," + "a" * 5000])
def test_data_urls_over_the_limit(url: str) -> None:
    with pytest.raises(RequestTooLarge):
        parse_data_url(url, 100)


@pytest.mark.parametrize("blanks", ["", " ", "\n\t"])
def test_large_data_urls_are_read_in_pieces(blanks: str) -> None:
    data = random.Random(0).randbytes(400_001)
    text = base64.b64encode(data).decode()
    lines = blanks.join(text[start : start + 76] for start in range(0, len(text), 76))
    assert parse_data_url(f"data:image/png;base64,{lines}", 1 << 20) == data
    escaped = text.replace("+", "%2B").replace("=", "%3D")
    assert parse_data_url(f"data:image/png;base64,{escaped}", 1 << 20) == data


@pytest.mark.parametrize("place", [0, 131_070, 131_072, 200_001])
@pytest.mark.parametrize("wrong", ["=", "-", "日"])
def test_what_is_wrong_is_found_in_every_piece(place: int, wrong: str) -> None:
    text = base64.b64encode(random.Random(0).randbytes(300_000)).decode()
    with pytest.raises(InvalidImage, match="base64"):
        parse_data_url(f"data:image/png;base64,{text[:place]}{wrong}{text[place + 1 :]}", 1 << 20)


# -- headers -----------------------------------------------------------------------------------------------------------


def huge_png(width: int, height: int) -> bytes:
    """A small file that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_known_formats_are_measured(kind: str) -> None:
    assert count_pixels(png(kind=kind), 10_000) == 32 * 24


def test_truncated_data_is_left_to_the_encoder() -> None:
    assert count_pixels(png(kind="JPEG")[:-20], 10_000) == 32 * 24


@pytest.mark.parametrize("size", [(14_000, 14_000), (9_000, 9_000), (200_000, 2_000)])
def test_bombs_are_found_by_their_header(size: tuple[int, int]) -> None:
    with pytest.raises(RequestTooLarge):
        count_pixels(huge_png(*size), 64_000_000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"  <!DOCTYPE html><html>", "web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (b"hello", "no image"),
        (PNG[:20], "broken|no image"),
        (png(kind="AVIF").replace(b"av01", b"av02"), "broken|no image"),
    ],
)
def test_what_is_no_picture(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        count_pixels(data, 10_000)


# -- file: -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    (folder / "ok.png").write_bytes(PNG)
    (folder / "sub" / "ä b.png").write_bytes(PNG)
    (folder / "inside").symlink_to(folder / "ok.png")
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "x.png").write_bytes(PNG)
    (folder / "outside").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize(
    "path", ["/ok.png", "/sub/%C3%A4%20b.png", "/inside", "/sub/../ok.png", "//ok.png", "/sub/%2e%2e/ok.png"]
)
@pytest.mark.parametrize("host", ["", "localhost"])
def test_files_inside(root: Path, path: str, host: str) -> None:
    assert read_file_url(f"file://{host}{root}{path}", root, 1 << 20) == PNG


@pytest.mark.parametrize(
    "url",
    [
        "file://{root}/../secret.png",
        "file://{root}/%2e%2e/secret.png",
        "file://{root}/outside",
        "file://{root}/up/secret.png",
        "file://{root}2/x.png",
        "file://{root}/missing.png",
        "file://{root}/fifo",
        "file://{root}/sub",
        "file://{root}",
        "file://{root}/ok.png%00.jpg",
        "file://host{root}/ok.png",
        "file:ok.png",
        "file://ok.png",
        "file:///proc/self/environ",
        "file:///etc/passwd",
        "file:///dev/zero",
        "file://{root}/%ff%fe",
        "file://{root}/" + "a" * 5000,
    ],
)
def test_files_outside_read_like_missing_ones(root: Path, url: str) -> None:
    with pytest.raises(MediaForbidden, match="not available"):
        read_file_url(url.format(root=root), root, 1 << 20)


def test_files_need_a_root_and_have_a_limit(root: Path) -> None:
    with pytest.raises(MediaForbidden, match="--allowed-local-media-path"):
        read_file_url(f"file://{root}/ok.png", None, 1 << 20)
    with pytest.raises(RequestTooLarge):
        read_file_url(f"file://{root}/ok.png", root, len(PNG) - 1)


# -- http: -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("198.18.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fec0::1", False),  # site-local: deprecated, still routed here and there
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::1", False),
        ("::127.0.0.1", False),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),
    ],
)
def test_addresses(address: str, allowed: bool) -> None:
    assert is_allowed(ipaddress.ip_address(address)) is allowed


def test_allowed_networks() -> None:
    networks = parse_networks(["127.0.0.0/8"])
    assert is_allowed(ipaddress.ip_address("127.0.0.1"), networks)
    assert is_allowed(ipaddress.ip_address("::ffff:127.0.0.1"), networks)
    assert not is_allowed(ipaddress.ip_address("10.0.0.1"), networks)
    with pytest.raises(ConfigError, match="--allowed-private-media"):
        parse_networks(["nonsense"])


@asynccontextmanager
async def web_server(answer: Callable[[str, bytes], bytes]) -> AsyncIterator[int]:
    """A server on 127.0.0.1 that gives `answer(path, head)`; yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(head.split()[1].decode(), head))
        await writer.drain()

    async with TcpServer(serve) as server:
        yield server.port


def ok(body: bytes, *headers: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in ("HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers))
    return head.encode() + b"\r\n" + body


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


LOOPBACK = parse_networks(["127.0.0.1/32"])


def fetcher(max_bytes: int = 1 << 20, timeout_s: float = 5) -> HttpFetcher:
    return HttpFetcher(max_bytes=max_bytes, timeout_s=timeout_s, allowed=LOOPBACK)


async def test_fetches_and_sends_nothing_of_the_client() -> None:
    heads: list[bytes] = []

    def answer(path: str, head: bytes) -> bytes:
        heads.append(head.lower())
        return redirect("/there") if path == "/here" else ok(PNG, "Set-Cookie: a=b")

    async with web_server(answer) as port:
        assert await fetcher().fetch(f"http://user:password@127.0.0.1:{port}/here") == PNG
        assert await fetcher().fetch(f"http://127.0.0.1:{port}/there?a=b#c") == PNG
    assert not any(word in head for head in heads for word in (b"authorization", b"cookie", b"password"))
    assert all(f"host: 127.0.0.1:{port}".encode() in head for head in heads)
    assert heads[2].startswith(b"get /there?a=b http")


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f000001", "localhost", "[::1]", "[::ffff:7f00:1]"])
async def test_private_addresses_are_refused(host: str) -> None:
    closed = HttpFetcher(max_bytes=100, timeout_s=5)
    with pytest.raises(MediaForbidden):
        await closed.fetch(f"http://{host}:9/x")


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("http://127.0.0.2/", MediaForbidden),
        ("http://169.254.169.254/latest/meta-data", MediaForbidden),
        ("file:///etc/passwd", MediaForbidden),
        ("gopher://127.0.0.1/", MediaForbidden),
        ("/again", MediaUnavailable),
        ("http://[::bad", MediaUnavailable),
    ],
)
async def test_each_redirect_is_checked(location: str, error: type[EPDError]) -> None:
    async with web_server(lambda path, head: redirect(location)) as port:
        with pytest.raises(error):
            await fetcher().fetch(f"http://127.0.0.1:{port}/")


async def test_one_private_address_among_public_ones_is_enough() -> None:
    async def rebinding(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.1"]

    with pytest.raises(MediaForbidden):
        await HttpFetcher(max_bytes=100, timeout_s=5, resolver=rebinding).fetch("http://example.test/")


async def test_connects_to_the_address_that_was_checked() -> None:
    asked: list[str] = []

    async def once(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    heads: list[bytes] = []

    def answer(path: str, head: bytes) -> bytes:
        heads.append(head)
        return ok(PNG)

    async with web_server(answer) as port:
        pinned = HttpFetcher(max_bytes=1 << 20, timeout_s=5, allowed=LOOPBACK, resolver=once)
        assert await pinned.fetch(f"http://pictures.example:{port}/a.png") == PNG
    assert asked == ["pictures.example"]
    assert f"host: pictures.example:{port}".encode() in heads[0].lower()


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", MediaUnavailable),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 0\r\n\r\n", MediaUnavailable),
        (ok(bytes(200)), RequestTooLarge),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(200), RequestTooLarge),
        (ok(b"x", "Content-Encoding: gzip"), MediaUnavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", MediaUnavailable),
        (b"SSH-2.0-nothttp\r\n", MediaUnavailable),
    ],
)
async def test_bad_answers(response: bytes, error: type[EPDError]) -> None:
    async with web_server(lambda path, head: response) as port:
        with pytest.raises(error):
            await fetcher(max_bytes=100).fetch(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("http://", InvalidRequest),
        ("http://127.0.0.1:99999/", InvalidRequest),
        ("http://127.0.0.1:1/", MediaUnavailable),
        ("http://does-not-exist.invalid/", MediaUnavailable),
        ("http://" + "a" * 300 + "/", MediaUnavailable),
    ],
)
async def test_bad_urls(url: str, error: type[EPDError]) -> None:
    with pytest.raises(error):
        await fetcher().fetch(url)


async def test_silent_server_times_out() -> None:
    """The system takes the connection, and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with pytest.raises(MediaUnavailable, match=r"0\.05 s"):
            await fetcher(timeout_s=0.05).fetch(url)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("example.com", True),
        ("EXAMPLE.com.", True),
        ("www.example.com", False),
        ("notexample.com", False),
        ("a.b.example.org", True),
        ("example.org", False),
        ("example.org.evil.test", False),
        ("bücher.test", True),
        ("xn--bcher-kva.test", True),
        ("2001:db8::1", True),
        ("127.0.0.1", False),
        ("", False),
        ("\ud800", False),
    ],
)
def test_hosts_by_name(host: str, allowed: bool) -> None:
    domains = Domains(["Example.com", "*.example.org", "bücher.test", "[2001:db8::1]"])
    assert (host in domains) is allowed
    assert host in Domains()


@pytest.mark.parametrize("text", ["", "*", "https://example.com", "example.com/x", "example.com:80", "a*.b", "user@x"])
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-media-domains"):
        Domains([text])


async def test_hosts_that_are_not_allowed_are_not_even_looked_up() -> None:
    looked_up: list[str] = []

    async def here(host: str, port: int) -> list[str]:
        looked_up.append(host)
        return ["127.0.0.1"]

    def answer(path: str, head: bytes) -> bytes:
        return redirect(f"http://other.example:{port}/") if path == "/away" else ok(PNG)

    narrow = HttpFetcher(
        max_bytes=1 << 20, timeout_s=5, allowed=LOOPBACK, domains=Domains(["good.example"]), resolver=here
    )
    async with web_server(answer) as port:
        assert await narrow.fetch(f"http://good.example:{port}/") == PNG
        for url in (f"http://other.example:{port}/", f"http://good.example:{port}/away", f"http://127.0.0.1:{port}/"):
            with pytest.raises(MediaForbidden):
                await narrow.fetch(url)
    assert set(looked_up) == {"good.example"}


async def test_names_in_other_scripts() -> None:
    async def here(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    heads: list[bytes] = []

    def answer(path: str, head: bytes) -> bytes:
        heads.append(head)
        return ok(PNG)

    async with web_server(answer) as port:
        abroad = HttpFetcher(max_bytes=1 << 20, timeout_s=5, allowed=LOOPBACK, resolver=here)
        assert await abroad.fetch(f"http://bücher.example:{port}/ä.png") == PNG
    assert f"host: xn--bcher-kva.example:{port}".encode() in heads[0].lower()


# -- together ----------------------------------------------------------------------------------------------------------


def loader(**limits: int) -> MediaLoader:
    return MediaLoader(MediaLimits(**limits), fetcher(), None)


def sources(*images: bytes) -> list[ImageSource]:
    return [ImageSource(data_url(image), f"part{i}") for i, image in enumerate(images)]


async def test_content_keys_depend_on_bytes_detail_and_model() -> None:
    first, second, low = await loader().load(
        [*sources(PNG, png("blue")), ImageSource(data_url(PNG), "part2", low_detail=True)], "model"
    )
    assert len({first.content_key, second.content_key, low.content_key, content_key("other", None, PNG)}) == 4
    assert first.content_key == content_key("model", None, PNG)
    assert (low.max_pixels, first.max_pixels, first.num_pixels) == (512 * 512, None, 32 * 24)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_images": 1},
        {"max_image_bytes": len(PNG) - 1},
        {"max_total_bytes": 2 * len(PNG) - 1},
        {"max_image_pixels": 32 * 24 - 1},
        {"max_total_pixels": 2 * 32 * 24 - 1},
    ],
)
async def test_limits_of_a_request(limits: dict[str, int]) -> None:
    with pytest.raises(RequestTooLarge):
        await loader(**limits).load(sources(PNG, PNG), "model")


@pytest.mark.parametrize("url", ["ftp://a/b", "javascript:1", "just text", "", "C:\\x.png"])
async def test_other_schemes(url: str) -> None:
    with pytest.raises(InvalidRequest, match="start with data:") as caught:
        await loader().load([ImageSource(url, "messages[0].content[1]")], "model")
    assert caught.value.param == "messages[0].content[1]"


async def test_pictures_over_the_limit_together_are_not_all_fetched_first() -> None:
    fetched = []

    def answer(path: str, head: bytes) -> bytes:
        fetched.append(path)
        return ok(PNG)

    async with web_server(answer) as port:
        urls = [ImageSource(f"http://127.0.0.1:{port}/{i}", "x") for i in range(32)]
        with pytest.raises(RequestTooLarge, match="together"):
            await loader(max_total_bytes=len(PNG)).load(urls, "model")
    assert len(fetched) < 16
