"""Learns what a server takes before load is put on it: its model, which fields it refuses, its tokens per word."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from epd.bench.http_client import HttpClient, ServerGone
from epd.bench.stream import AnswerReader
from epd.bench.words import make_text
from epd.bench.workload import PromptScale
from epd.errors import ConfigError

_OPTIONAL_FIELDS: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
"""Sent where the server takes them."""
_REFUSALS = (400, 422)
_SHORT, _LONG = 16, 80
"""Words of the two prompts whose difference gives tokens per word."""


@dataclass(frozen=True)
class ServerTraits:
    """What a server takes."""

    model: str
    fields: dict[str, Any]
    """Of each request's body."""
    scale: PromptScale
    refused: tuple[str, ...]
    """Optional fields that it does not take."""


async def probe(
    client: HttpClient, *, model: str | None, ignore_eos: bool, extra_body: Mapping[str, Any], seed: int
) -> ServerTraits:
    """Ask the server a few short questions, which also warm it up.

    Args:
        client: for the server.
        model: None for the first that it lists.
        ignore_eos: whether to try that field.
        extra_body: further fields of each body; they win over ours.
        seed: makes the questions differ from those of other runs.

    Raises:
        ConfigError: the server does not answer, or refuses the plainest request.
    """
    rng = random.Random(f"probe:{seed}")
    name = model or await _first_model(client)
    fields: dict[str, Any] = {"model": name, "stream": True, "temperature": 0, **_OPTIONAL_FIELDS, **extra_body}
    if not ignore_eos:
        fields.pop("ignore_eos", None)
    refused: list[str] = []
    while True:
        status, reader = await _ask_streaming(client, fields, make_text(rng, _SHORT))
        if status == 200:
            break
        culprit = _refused_field(reader.body, fields, extra_body)
        if status not in _REFUSALS or culprit is None:
            raise ConfigError(f"the server refuses a plain request with {status}: {_shown(reader.body)}")
        fields.pop(culprit)
        refused.append(culprit)
    return ServerTraits(name, fields, await _scale(client, fields, rng), tuple(refused))


async def _first_model(client: HttpClient) -> str:
    status, body = await _call(client, "GET", "/models")
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError) as error:
        raise ConfigError(
            f"GET /models gives no model (status {status}: {_shown(body)}); name one with --model"
        ) from error


async def _ask_streaming(client: HttpClient, fields: Mapping[str, Any], text: str) -> tuple[int, AnswerReader]:
    reader = AnswerReader()
    status = await _send(client, "POST", "/chat/completions", _body(fields, text), reader.feed)
    reader.record("probe", 0.0)  # takes what is left behind the last line
    return status, reader


async def _scale(client: HttpClient, fields: Mapping[str, Any], rng: random.Random) -> PromptScale:
    """From the usage of two prompts that differ in length; a guess where the server counts nothing."""
    counts = []
    whole = {key: value for key, value in fields.items() if key not in ("stream", "stream_options")}
    for words in (_SHORT, _LONG):
        _, body = await _call(client, "POST", "/chat/completions", _body(whole, make_text(rng, words)))
        try:
            counts.append(int(msgspec.json.decode(body)["usage"]["prompt_tokens"]))
        except (msgspec.DecodeError, LookupError, TypeError):
            return PromptScale()
    tokens_per_word = (counts[1] - counts[0]) / (_LONG - _SHORT)
    if tokens_per_word <= 0:
        return PromptScale()
    return PromptScale(tokens_per_word, counts[0] - _SHORT * tokens_per_word)


def _body(fields: Mapping[str, Any], text: str) -> bytes:
    return msgspec.json.encode({"messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields})


async def _call(client: HttpClient, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    pieces: list[bytes] = []
    status = await _send(client, method, path, body, pieces.append)
    return status, b"".join(pieces)


async def _send(client: HttpClient, method: str, path: str, body: bytes, on_body: Any) -> int:
    try:
        return await client.request(method, path, body, on_body)
    except ServerGone as error:
        raise ConfigError(f"no server answers: {error}") from error


def _refused_field(body: bytes, fields: Mapping[str, Any], extra_body: Mapping[str, Any]) -> str | None:
    """The optional field that an error names. Fields of --extra-body were asked for, so they are never dropped."""
    text = body.decode(errors="replace")
    return next((name for name in _OPTIONAL_FIELDS if name in fields and name not in extra_body and name in text), None)


def _shown(body: bytes) -> str:
    return body.decode(errors="replace")[:300] or "no body"
