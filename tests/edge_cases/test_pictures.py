"""Cases 23 to 34: pictures, and where they come from.

A picture in an unusual file must be answered as the plain one with the pixels that a person would see: the same text
with the same log probabilities.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from epd.errors import MediaForbidden
from proxy.media.http import HttpFetcher, is_allowed
from tests.cluster.harness import Cluster as RealCluster
from tests.cluster.reference import data_url, picture, png, text_part
from tests.edge_cases.asking import CHAT, error_of
from tests.proxy.conftest import Cluster, ClusterFactory
from tests.proxy.conftest import png as small_png
from tests.proxy.test_media import LOOPBACK, ok, redirect, web_server


def about(url: str) -> dict[str, Any]:
    """A question about a picture, with all that its answer tells of the pixels."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, text_part("What colour?")]
    messages = [{"role": "user", "content": parts}]
    return {"messages": messages, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 3}


def seen(demo: RealCluster, data: bytes) -> Any:
    """What the model makes of a picture."""
    status, body = demo.post(CHAT, about(data_url(data)))
    assert status == 200, body
    return body["choices"][0]["logprobs"], body["usage"]["prompt_tokens_details"]["image_tokens"]


def refused(demo: RealCluster, data: bytes, status: int, code: str, says: str = "") -> None:
    for stream in (False, True):
        got, body = demo.post(CHAT, about(data_url(data)) | {"stream": stream})
        assert (got, body["error"]["code"]) == (status, code), body
        assert says.lower() in body["error"]["message"].lower()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def declared(width: int, height: int, color: int = 2) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


# -- files -----------------------------------------------------------------------------------------------------------


def test_e23_truncated_and_damaged_files(demo: RealCluster) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    jpeg, plain = saved(noise, "JPEG"), png(noise)
    refused(demo, jpeg[: len(jpeg) // 2], 400, "invalid_image")
    refused(demo, plain[: len(plain) // 2], 400, "invalid_image")
    middle = len(plain) // 2
    refused(demo, plain[:middle] + bytes(64) + plain[middle + 64 :], 400, "invalid_image")
    refused(demo, saved(noise, "GIF")[:200], 400, "invalid_image")
    refused(demo, saved(noise, "WEBP")[:300], 400, "invalid_image")


def test_e24_what_is_no_picture(demo: RealCluster) -> None:
    refused(demo, b"<!doctype html><html><body>404</body></html>", 400, "invalid_image", "web page")
    refused(demo, b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "invalid_image", "SVG")
    refused(demo, b"%PDF-1.7\n", 400, "invalid_image")
    refused(demo, b"hello", 400, "invalid_image")
    refused(demo, b"\x89PNG\r\n\x1a\n", 400, "invalid_image")


async def test_e25_decompression_bombs(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster()
    for size in ((9000, 9000), (14_000, 14_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)):
        response = await cluster.http.post(CHAT, json=about(data_url(declared(*size))))
        status, code, param = error_of(response)
        assert (status in (400, 413), param) == (True, "messages[0].content[0]"), response.text
        assert code in ("request_too_large", "invalid_image")
        assert "base64" not in response.text
    assert not cluster.encoder.pictures
    many = about(data_url(declared(7999, 7999)))
    many["messages"][0]["content"] *= 5  # each is legal
    assert error_of(await cluster.http.post(CHAT, json=many))[:2] == (413, "request_too_large")


def test_e26_a_large_legal_picture_costs_what_its_resized_form_does(demo: RealCluster) -> None:
    large = saved(picture(3, 3000, 2000), "JPEG")
    _, tokens = seen(demo, large)
    assert 0 < tokens < 3000
    status, body = demo.post(CHAT, {"messages": [{"role": "user", "content": about(data_url(large))["messages"][0][
        "content"][:1] * 8}], "max_tokens": 1})  # fmt: skip
    assert status in (200, 400), body
    if status == 400:
        assert body["error"]["code"] == "context_length_exceeded"


def test_e27_tiny_and_elongated_pictures(demo: RealCluster) -> None:
    for size in ((1, 1), (1, 20), (20, 1), (27, 27), (5, 900), (900, 5)):
        _, tokens = seen(demo, png(picture(2, *size)))
        assert tokens > 0, size
    refused(demo, png(picture(2, 1, 5000)), 400, "invalid_image", "aspect")
    refused(demo, png(picture(2, 5000, 1)), 400, "invalid_image", "aspect")


def test_e28_exif_orientation_is_applied_once_and_before_tokens_are_counted(demo: RealCluster) -> None:
    upright = picture(4, 140, 84)
    want = seen(demo, png(upright))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    assert seen(demo, saved(stored, "PNG", exif=exif)) == want
    assert seen(demo, png(stored)) != want


def test_e29_transparent_pictures_stand_on_white(demo: RealCluster) -> None:
    """Black text on a transparent ground, which black would hide."""
    ink = np.zeros((84, 112, 4), np.uint8)
    ink[20:60, 30:80, 3] = 255
    flat = Image.new("RGB", (112, 84), "white")
    flat.paste((0, 0, 0), (30, 20, 80, 60))
    want = seen(demo, png(flat))
    rgba = Image.fromarray(ink)
    assert seen(demo, png(rgba)) == want
    assert seen(demo, saved(rgba.convert("LA"), "PNG")) == want
    palette = Image.new("P", (112, 84), 0)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    palette.paste(1, (30, 20, 80, 60))
    assert seen(demo, saved(palette, "PNG", transparency=0)) == want
    assert seen(demo, saved(palette, "GIF", transparency=0)) == want


def test_e30_colour_models_and_depths(demo: RealCluster) -> None:
    ramp = np.tile(np.linspace(0, 255, 112).astype(np.uint8), (84, 1))
    want = seen(demo, png(Image.fromarray(ramp).convert("RGB")))
    assert seen(demo, png(Image.fromarray(ramp))) == want
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert seen(demo, png(deep)) == want, "scaled, not clipped to white"
    one_bit = Image.fromarray(ramp > 127)
    assert seen(demo, png(one_bit)) == seen(demo, png(one_bit.convert("RGB")))
    cmyk = saved(picture(5).convert("CMYK"), "JPEG", quality=95)
    decoded = Image.open(io.BytesIO(cmyk)).convert("RGB")
    assert seen(demo, cmyk) == seen(demo, png(decoded))
    for head, name in ((b"\0\0\0\x18ftypheic", "HEIC"), (b"8BPS\0\1", ""), (b"\0\0\1\0\1\0", "")):
        refused(demo, head + bytes(60), 400, "invalid_image", name)


def test_e31_animations_are_their_first_frame(demo: RealCluster) -> None:
    colours = [Image.new("RGB", (112, 84), colour) for colour in ("red", "blue", "lime")]
    want = seen(demo, png(colours[0]))
    for kind in ("GIF", "PNG", "WEBP"):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        moving = saved(colours[0], kind, save_all=True, append_images=colours[1:], **options)
        assert seen(demo, moving) == want, kind
    many = saved(colours[0], "GIF", save_all=True, append_images=[*colours[1:]] * 200, optimize=False)
    assert seen(demo, many) == want, "hundreds of frames cost no more than one"


# -- addresses -------------------------------------------------------------------------------------------------------

PNG = small_png()
BASE64 = base64.b64encode(PNG).decode()


async def answers(cluster: Cluster, url: str) -> tuple[int, str | None]:
    """Status and error code of a question about a picture."""
    response = await cluster.http.post(CHAT, json=about(url))
    return (200, None) if response.status_code == 200 else error_of(response)[:2]


async def test_e32_data_urls(cluster: Cluster) -> None:
    good = [
        f"data:image/png;base64,{BASE64}",
        f"DATA:IMAGE/PNG;BASE64,{BASE64}",
        f"data:image/jpeg;charset=utf-8;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"data:image/png;base64,\n{BASE64[:30]}\r\n {BASE64[30:]}\t",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    ]
    for url in good:
        assert await answers(cluster, url) == (200, None), url[:60]
    assert {picture.data for picture in cluster.encoder.pictures} == {PNG}
    url_safe = base64.urlsafe_b64encode(bytes(range(248, 256)) * 3).decode()
    bad = [
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:,",
        "data:",
        f"data:image/png;base64,{BASE64[:-4]}!{BASE64[-4:]}",
        f"data:image/png;base64,{BASE64.rstrip('=')}A",
        f"data:image/png;base64,{url_safe}",
        f"data:image/png;base64,{BASE64}\u200b",
        f"data:image/png;base64,{BASE64}\0",
        f"data:image/png,{BASE64}",  # not said to be base64
        "data:text/html,<script>",
    ]
    for url in bad:
        assert await answers(cluster, url) == (400, "invalid_image"), url[:60]
    for url in ("", " ", "x", BASE64, "javascript:alert(1)", f" data:image/png;base64,{BASE64}", "blob:x"):
        assert (await answers(cluster, url))[0] == 400, url[:60]


PRIVATE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0", "localhost", "[::1]", "[::]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "10.0.0.1", "172.16.0.1", "192.168.1.1",
    "169.254.169.254", "[fe80::1]", "[fd00::1]", "[fec0::1]", "100.64.0.1", "192.0.0.8", "198.18.0.1", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[ff02::1]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]", "user:password@127.0.0.1", "127.0.0.1.", "①②⑦.⓪.⓪.①",
]  # fmt: skip


async def test_e33_private_addresses_however_they_are_written(cluster: Cluster) -> None:
    for host in PRIVATE:
        for url in (f"http://{host}/x.png", f"HTTPS://{host}:8443/x.png"):
            status, code = await answers(cluster, url)
            # Some systems do not read the older ways to write numbers: then the name is not found.
            assert (status, code) in ((403, "media_forbidden"), (422, "media_unavailable")), host
    assert await answers(cluster, "http://169.254.169.254/latest") == (403, "media_forbidden")


async def test_e33_redirects_are_checked_and_bounded(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(allowed_private_media=("127.0.0.1/32",))
    heads: list[bytes] = []
    ways = {
        "/loop": "/loop",
        "/metadata": "http://169.254.169.254/latest/meta-data",
        "/neighbour": "http://127.0.0.2/",
        "/file": "file:///etc/passwd",
        "/data": f"data:image/png;base64,{BASE64}",
        "/decimal": "http://2130706434/",
        "/fine": "/picture",
    }

    def answer(path: str, head: bytes) -> bytes:
        heads.append(head.lower())
        return redirect(ways[path]) if path in ways else ok(PNG)

    async with web_server(answer) as port:
        base = f"http://name:secret@127.0.0.1:{port}"
        for path in ("/metadata", "/neighbour", "/file", "/decimal"):
            assert await answers(cluster, base + path) == (403, "media_forbidden"), path
        for path in ("/loop", "/data"):
            assert await answers(cluster, base + path) == (422, "media_unavailable"), path
        assert await answers(cluster, f"{base}/fine") == (200, None)
    assert not any(word in head for head in heads for word in (b"authorization", b"cookie", b"secret"))


async def test_e33_a_name_is_looked_up_once_and_the_address_that_was_checked_is_used() -> None:
    """A second look-up could say something else (DNS rebinding)."""
    answered: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        answered.append(host)
        return ["127.0.0.1"] if len(answered) == 1 else ["169.254.169.254"]

    async with web_server(lambda path, head: ok(PNG)) as port:
        fetcher = HttpFetcher(max_bytes=1 << 20, timeout_s=5, allowed=LOOPBACK, resolver=rebinding)
        assert await fetcher.fetch(f"http://pictures.example:{port}/") == PNG
        assert answered == ["pictures.example"]
        with pytest.raises(MediaForbidden):
            await fetcher.fetch(f"http://pictures.example:{port}/")


def test_e33_all_of_the_embedded_forms_are_seen_through() -> None:
    import ipaddress

    for inner in ("127.0.0.1", "169.254.169.254", "10.0.0.1"):
        number = int(ipaddress.IPv4Address(inner))
        forms = [
            ipaddress.IPv6Address(f"::ffff:{inner}"),
            ipaddress.IPv6Address(number),
            ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) | number),
            ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | 1),
        ]
        assert not any(is_allowed(form) for form in forms)


FILES: dict[str, Callable[[Path], str]] = {
    "outside": lambda root: f"file://{root.parent}/secret.png",
    "dots": lambda root: f"file://{root}/../secret.png",
    "coded dots": lambda root: f"file://{root}/%2e%2e/secret.png",
    "link that leads out": lambda root: f"file://{root}/link.png",
    "missing": lambda root: f"file://{root}/missing.png",
    "folder": lambda root: f"file://{root}",
    "host": lambda root: f"file://host{root}/ok.png",
    "relative": lambda _: "file:ok.png",
    "NUL": lambda root: f"file://{root}/ok.png%00",
    "proc": lambda _: "file:///proc/self/environ",
    "device": lambda _: "file:///dev/zero",
    "sibling": lambda root: f"file://{root}2/x.png",
}


async def test_e34_files(start_cluster: ClusterFactory, tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (root / "ok.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inside.png").symlink_to(root / "ok.png")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "x.png").write_bytes(PNG)
    cluster = await start_cluster(allowed_local_media_path=root)
    for name in ("ok.png", "inside.png"):
        assert await answers(cluster, f"file://{root}/{name}") == (200, None)
    told = set()
    for name, url in FILES.items():
        response = await cluster.http.post(CHAT, json=about(url(root)))
        assert error_of(response)[:2] == (403, "media_forbidden"), name
        told.add(response.json()["error"]["message"])
    assert len(told) == 1, "whether a file exists is not told"
    assert all(picture.data == PNG for picture in cluster.encoder.pictures), "bytes go to workers, never paths"


async def test_e34_no_file_without_a_folder(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "ok.png").write_bytes(PNG)
    assert await answers(cluster, f"file://{tmp_path}/ok.png") == (403, "media_forbidden")


@pytest.mark.parametrize("detail", ["low", "high", "auto", "original", None])
async def test_e26_detail_is_never_refused(cluster: Cluster, detail: str | None) -> None:
    body = about(f"data:image/png;base64,{BASE64}")
    body["messages"][0]["content"][0]["image_url"]["detail"] = detail
    assert (await cluster.http.post(CHAT, json=body)).status_code == 200
    assert (cluster.encoder.pictures[0].request.max_pixels is not None) == (detail == "low")
