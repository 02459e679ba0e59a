"""Large bodies, of which pictures are taken out as they arrive: nobody may see a difference."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import proxy.app
from epd.errors import EPDError
from proxy.api.json_body import Body, decode_body
from proxy.api.large_body import LargeBody
from proxy.api.messages.schema import MessagesRequest
from proxy.api.openai.prompt import messages_of
from proxy.api.openai.schema import ChatRequest
from proxy.media.inline import InlinePicture
from proxy.media.loader import parse_data_url
from tests.proxy.conftest import Cluster, ClusterFactory, data_url, png

LIMIT = 1 << 20
PICTURE = random.Random(0).randbytes(300_001)
OTHER = random.Random(1).randbytes(150_000)
BASE64 = base64.b64encode(PICTURE).decode()
URL = data_url(PICTURE)
SIZES = (1400, 65_536, 1 << 20)
"""Of pieces: as packets bring them, as a server reads them, all at once."""


def in_pieces(body: bytes, size: int) -> Body:
    large = LargeBody()
    for start in range(0, len(body), size):
        large.add(body[start : start + size])
    return large.finish()


def chat(*urls: str, **fields: Any) -> bytes:
    """A conversation about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    text = {"type": "text", "text": 'What is "this", dear?'}
    return json.dumps({"messages": [{"role": "user", "content": [text, *parts]}], **fields}).encode()


def outcome(body: Body) -> Any:
    """All that a conversation says, its pictures as bytes; or what is wrong with it."""
    try:
        request = decode_body(body, ChatRequest)
        messages, sources = messages_of(request)
    except EPDError as error:
        return type(error), error.message, error.param
    return messages, [picture(source.url) for source in sources], request.chat_template_kwargs


def picture(url: str) -> Any:
    try:
        return parse_data_url(url, LIMIT)
    except EPDError as error:
        return type(error), error.message


def taken(body: Body) -> list[bytes]:
    """Pictures that were taken out."""
    if not isinstance(body, LargeBody):
        return []
    _, sources = messages_of(decode_body(body, ChatRequest))
    return [source.url.data() for source in sources if isinstance(source.url, InlinePicture)]


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_bytes_before_the_json_is_read(size: int) -> None:
    body = chat(URL, data_url(OTHER), URL)
    large = in_pieces(body, size)
    assert taken(large) == [PICTURE, OTHER, PICTURE]
    assert outcome(large) == outcome(body)
    assert outcome(large)[1] == [PICTURE, OTHER, PICTURE]
    assert isinstance(large, LargeBody)
    assert large.size == len(body)
    assert large.restored() == body
    assert len(large.json) < 1000


def test_slashes_may_be_escaped() -> None:
    body = chat(URL).replace(b"/", rb"\/")
    for size in SIZES:
        assert taken(in_pieces(body, size)) == [PICTURE]
    assert all(taken(in_pieces(body, size)) == [PICTURE] for size in range(1395, 1402))  # cut within an escape too


@pytest.mark.parametrize("letters", range(1 << 16, (1 << 16) + 4))
def test_backslashes_are_not_lost_where_pieces_end(letters: int) -> None:
    start = b'{"messages": [{"role": "user", "content": "' + b"A" * letters + rb"\\/"
    body = start + b"A" * 100_000 + b'"}]}'
    assert outcome(in_pieces(body, len(start))) == outcome(body)
    assert outcome(in_pieces(body, len(start) - 1)) == outcome(body)


def with_letter(at: int, letter: str) -> str:
    return data_url(PICTURE)[:at] + letter + data_url(PICTURE)[at + 1 :]


SEEN_AS_BEFORE = {
    "no padding": chat(URL.rstrip("=")),
    "too much padding": chat(URL + "="),
    "padding within": chat(URL[:-8] + "QQ==" + URL[-4:]),
    "padding at the end of a piece": chat(URL[: 22 + (1 << 17)] + "QQ==" + URL[22 + (1 << 17) :]),
    "padding alone": chat(data_url(PICTURE[:300_000]) + "===="),
    "bits behind the end": chat(data_url(PICTURE[:300_000]) + "QR=="),
    "one letter more": chat(data_url(PICTURE[:300_000]) + "Q"),
    "letters of URLs": chat(URL.replace("+", "-").replace("/", "_")),
    "percent": chat(URL.replace("+", "%2B")),
    "percent in front": chat(URL.replace("image/png", "image%2Fpng")),
    "lines": chat("\n".join(URL[at : at + 76] for at in range(0, len(URL), 76))),
    "blanks at the end": chat(URL + " \n"),
    "escaped letters": chat(URL).replace(b"+", rb"\u002b"),
    "wrong letter early": chat(with_letter(5000, "!")),
    "wrong letter late": chat(with_letter(250_000, "!")),
    "wrong letter last": chat(with_letter(len(URL) - 1, "!")),
    "letter of no ASCII": chat(with_letter(250_000, "é")),
    "backslash and slash": json.dumps({"messages": [{"role": "user", "content": URL}]}).encode().replace(b"/", rb"\\/"),
    "backslash at the end": chat(URL).replace(b'="', rb'=\""'),
    "no comma": chat(URL.replace(",", ".")),
    "no base64": chat(URL.replace(";base64,", ",")),
    "two commas": chat(URL.replace("image/png", "image/png,x")),
    "not data:": chat(URL.replace("data:", "x:")),
    "capitals": chat(URL.replace("data:", "DATA:")),
    "bare": chat(BASE64),
    "text": chat(URL, chat_template_kwargs={"url": URL, "data": BASE64, "image_url": {"url": BASE64}}),
    "text, bits behind the end": chat(URL, chat_template_kwargs={"url": data_url(PICTURE[:300_000]) + "QR=="}),
    "text like names": chat(URL, chat_template_kwargs={"url": URL, "hash": "0123456789" * 4}),
    "unknown field": chat(URL, something={"data": BASE64}),
    "the same key twice": chat(URL).replace(b'{"url"', b'{"url": "%b", "url"' % data_url(OTHER).encode()),
    "the same body twice": chat(URL) * 2,
    "control character": chat(URL).replace(BASE64[250_000:250_050].encode(), BASE64[250_000:250_050].encode() + b"\n"),
    "UTF-8 that is none": chat(URL).replace(b"dear", b"d\xe9ar"),
    "UTF-8 that is none within": chat(URL).replace(BASE64[250_000:250_050].encode(), b"\xff" * 50),
    "cut off within": chat(URL)[:250_000],
    "cut off behind": chat(URL)[:-3],
    "wrong before": chat(URL).replace(b'"messages"', b'"messages'),
    "wrong behind": chat(URL) + b"}",
    "wrong behind escapes": chat(URL, data_url(OTHER)).replace(b"/", rb"\/") + b"}",
    "wrong between": chat(URL, data_url(OTHER)).replace(b"}, {", b"}; {"),
    "wrong type before": chat(URL).replace(b'"role": "user"', b'"role": 7'),
    "wrong type behind": chat(URL, temperature="hot"),
    "out of range": chat(URL, temperature=7),
    "number": chat(URL).replace(b'"%b"' % URL.encode(), b"1" * 100_000),
    "no quotes": BASE64.encode(),
    "a quote alone": b'"' + BASE64.encode(),
    "a text alone": b'"%b"' % BASE64.encode(),
    "between texts": b'{"messages"%b"x":1}' % BASE64.encode(),
    "behind a text": b'{"messages": "x"%b' % BASE64.encode(),
    "a key": b'{"%b": 1}' % BASE64.encode(),
    "very many parts": chat(URL).replace(b"[", b"[" + b"{}," * 20_000),
    "text of the turn": json.dumps({"messages": [{"role": "user", "content": URL}]}).encode(),
    "text of a part": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": URL}, {"type": "text", "text": BASE64}]}]}
    ).encode(),
    "JSON as text": json.dumps(
        {
            "messages": [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": json.dumps({"data": BASE64, "url": URL})}}],
                },
            ]
        }
    ).encode(),
    "arguments": json.dumps(
        {
            "messages": [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"data": BASE64, "url": URL}}}],
                },
            ]
        }
    ).encode(),
}


@pytest.mark.parametrize("name", SEEN_AS_BEFORE)
def test_what_can_not_be_taken_out_is_seen_as_before(name: str) -> None:
    body = SEEN_AS_BEFORE[name]
    wanted = outcome(body)
    for size in SIZES:
        assert outcome(in_pieces(body, size)) == wanted


def test_names_can_not_be_forged() -> None:
    """Nobody learns a name, and those of another body, or of a picture that has its place already, are plain text."""
    large = in_pieces(chat(URL), 65_536)
    assert isinstance(large, LargeBody)
    _, [source] = messages_of(decode_body(large, ChatRequest))
    assert isinstance(source.url, InlinePicture)
    name = source.url.name
    forged = chat(f"data:image/png;base64,{name}", name)
    assert outcome(in_pieces(forged, 100)) == outcome(forged)
    large.json[:] = chat(f"data:image/png;base64,{name}", name)  # as if somebody had known it
    _, sources = messages_of(decode_body(large, ChatRequest))
    assert [picture(source.url) == PICTURE for source in sources] == [True, False]
    large.json[:] = chat(f"data:image/png,x;base64,{name}")
    assert not large.hand_out(decode_body(large.json, ChatRequest))


def test_large_texts_stay() -> None:
    words = " ".join(random.Random(0).choices(["to", "be,", "or not", '"quoted"', "\n", "ü"], k=100_000))
    body = json.dumps({"messages": [{"role": "user", "content": words}]}, ensure_ascii=False).encode()
    for size in SIZES:
        large = in_pieces(body, size)
        assert isinstance(large, bytearray)
        assert large == body


def requests() -> Iterator[tuple[str, str]]:
    """Fields of structs that requests are made of, by the names of those that hold pictures."""
    todo: list[type[msgspec.Struct]] = [msgspec.Struct]
    for kind in todo:
        todo += kind.__subclasses__()
        is_ours = kind.__module__.startswith("proxy.api.") and not kind.__module__.startswith("proxy.api.vectors")
        for field in kind.__struct_fields__ if is_ours else ():
            if field in ("url", "image_url", "data", "image_data"):
                yield kind.__name__, field


def test_no_field_of_these_names_has_another_meaning() -> None:
    assert proxy.app
    assert set(requests()) == {
        ("ImageURL", "url"),
        ("ContentPart", "image_url"),
        ("BlockSource", "url"),
        ("BlockSource", "data"),
        ("InputPart", "image_url"),
        ("NativeMedium", "data"),
        ("SGLangRequest", "image_data"),
        ("NewLMDeployRequest", "image_data"),
        ("InteractiveRequest", "image_url"),
        ("_Keys", "image_data"),
    }


def test_free_form_of_other_dialects() -> None:
    """A tool's input may be called as a picture is, and stays what it is."""
    used = {"type": "tool_use", "id": "t", "name": "f", "input": {"data": BASE64, "url": URL}}
    body = json.dumps({"max_tokens": 1, "messages": [{"role": "assistant", "content": [used]}]}).encode()
    decoded = decode_body(in_pieces(body, 65_536), MessagesRequest)
    assert isinstance(decoded.messages[0].content, list)
    assert decoded.messages[0].content[0].input == used["input"]


# -- all dialects, over HTTP -------------------------------------------------------------------------------------------

MARKED = "<|vision_start|><|image_pad|><|vision_end|>what?"


def bitmap(seed: int) -> bytes:
    """A large picture that no other test has."""
    small = png(size=(320, 320), kind="BMP")
    return small[:54] + random.Random(seed).randbytes(len(small) - 54)


def part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def bare(data: bytes) -> str:
    return base64.b64encode(data).decode()


def block(data: bytes) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/bmp", "data": bare(data)}}


def of_user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def medium(kind: str, data: str) -> dict[str, Any]:
    return {"inputs": MARKED, "multimodal_params": {"images": [{"type": kind, "data": data}]}}


def of_tool(data: bytes) -> list[dict[str, Any]]:
    used = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block(data)]}
    return [*of_user("look"), {"role": "assistant", "content": [used]}, *of_user([result])]


DIALECTS: dict[str, tuple[str, Any]] = {
    "chat": ("/v1/chat/completions", lambda data: {"messages": of_user([part(data)])}),
    "chat, URL alone": (
        "/v1/chat/completions",
        lambda data: {"messages": of_user([{"type": "image_url", "image_url": data_url(data)}])},
    ),
    "messages": ("/v1/messages", lambda data: {"max_tokens": 9, "messages": of_user([block(data)])}),
    "messages, URL": (
        "/v1/messages",
        lambda data: {
            "max_tokens": 9,
            "messages": of_user([{"type": "image", "source": {"type": "url", "url": data_url(data)}}]),
        },
    ),
    "messages, of a tool": ("/v1/messages", lambda data: {"max_tokens": 9, "messages": of_tool(data)}),
    "responses": (
        "/v1/responses",
        lambda data: {"input": of_user([{"type": "input_image", "image_url": data_url(data)}])},
    ),
    "LightLLM": ("/generate", lambda data: medium("base64", bare(data))),
    "LightLLM, URL": ("/generate_stream", lambda data: medium("url", data_url(data))),
    "SGLang": ("/generate", lambda data: {"text": MARKED, "image_data": bare(data)}),
    "SGLang, URL": ("/generate", lambda data: {"text": MARKED, "image_data": data_url(data)}),
    "LMDeploy": ("/generate", lambda data: {"prompt": MARKED, "max_tokens": 9, "image_data": [bare(data)]}),
    "LMDeploy, interactive": (
        "/v1/chat/interactive",
        lambda data: {"prompt": "what?", "image_url": [data_url(data)]},
    ),
}


async def test_every_dialect(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture comes out of the body, and nowhere is the body needed as it was."""
    monkeypatch.setattr(LargeBody, "restored", None)
    for seed, (name, (path, body)) in enumerate(DIALECTS.items()):
        data = bitmap(seed)
        response = await cluster.http.post(path, json=body(data))
        assert response.status_code == 200, (name, response.text)
        assert cluster.encoder.pictures[-1].data == data, name


async def test_errors_name_the_field(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_image_bytes=400_000)
    good, wrong = bitmap(0), random.Random(0).randbytes(300_000)
    cases: list[tuple[list[Any], dict[str, Any], int, str]] = [
        ([part(good), part(wrong)], {}, 400, "messages[0].content[1]"),
        ([part(good), part(good + wrong)], {}, 413, "messages[0].content[1]"),
        ([part(good)], {"temperature": 9}, 400, "temperature"),
        ([part(good), {"type": "text", "text": 7}], {}, 400, "messages[0].content[1].text"),
        ([part(good), {"type": "odd", "image_pil": data_url(good)}], {}, 400, "messages[0].content[1]"),
    ]
    for parts, fields, status, param in cases:
        response = await cluster.http.post("/v1/chat/completions", json={"messages": of_user(parts)} | fields)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param)
        assert len(response.content) < 1000
    response = await cluster.http.post("/generate", json=medium("base64", data_url(good)))
    assert (response.status_code, response.json()["param"]) == (400, "multimodal_params.images[0]")


async def test_pictures_count_as_before(start_cluster: ClusterFactory) -> None:
    """The body as it came, and the picture."""
    data = bitmap(0)
    cluster = await start_cluster(max_media_bytes=len(data) * 2)
    response = await cluster.chat(data)
    assert (response.status_code, "--max-media-bytes" in response.text) == (429, True)
    assert cluster.service.bytes.held == 0
