"""`POST /generate` of SGLang and of today's LMDeploy: a raw prompt to text, tokens and `meta_info`.

They differ in names, and in streams: SGLang's events hold all text so far, LMDeploy's what is new.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response

from epd.errors import InvalidRequest
from epd.types import SamplingParams
from proxy.api.dialect import DONE, Head, News, ServerSent, Timings, server_sent
from proxy.api.http import Exchange
from proxy.api.json_body import Body, decode_body
from proxy.api.lightllm.answer import finite
from proxy.api.lightllm.raw_answer import RawRequest, answer_raw
from proxy.api.lightllm.token_native_schema import (
    DEFAULT_NEW_TOKENS,
    NewLMDeployRequest,
    SGLangRequest,
    TokenNativeSampling,
)
from proxy.api.openai.objects import Usage
from proxy.api.openai.sampling import check_token_ids, stop_strings
from proxy.api.requests import service_of
from proxy.media.inline import base64_url
from proxy.media.loader import ImageSource
from proxy.models.served_model import ServedModel
from proxy.text.answer import Answer, Piece, TextOptions

_IS_URL = re.compile(r"(https?|data|file):", re.IGNORECASE)


class MetaInfo(Struct):
    """What is known of an answer, so far in a stream."""

    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | UnsetType = UNSET
    """Of a whole answer."""
    output_token_logprobs: list[tuple[float, int, None]] | UnsetType = UNSET
    e2e_latency: float | UnsetType = UNSET


class TokenNativeAnswer(Struct):
    """Answer of SGLang's and today's LMDeploy's `POST /generate`, and each event of its stream."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo


async def answer_sglang(request: Request, body: Body, arrived: float) -> Response:
    """Answer `POST /generate` with `text`, or with `input_ids` and `sampling_params`.

    Args:
        request: of which the body was read already.
        body: as it came.
        arrived: `time.perf_counter()` when it did.

    Raises:
        EPDError: it can't be answered.
    """
    asked = decode_body(body, SGLangRequest)
    asked.check()
    sampling = asked.sampling_params
    return _answered(
        request,
        arrived,
        prompt=("text", asked.text) if isinstance(asked.text, str) else ("input_ids", _ids(asked.input_ids)),
        images=asked.image_data,
        sampling=sampling if isinstance(sampling, TokenNativeSampling) else TokenNativeSampling(),
        with_logprobs=asked.return_logprob is True,
        stream=bool(asked.stream),
        is_cumulative=True,
        name=asked.rid if isinstance(asked.rid, str) else None,
    )


async def answer_new_lmdeploy(request: Request, body: Body, arrived: float) -> Response:
    """Answer `POST /generate` with a `prompt` or `input_ids` in the words of today's LMDeploy; as `answer_sglang`."""
    asked = decode_body(body, NewLMDeployRequest)
    asked.check()
    return _answered(
        request,
        arrived,
        prompt=("prompt", asked.prompt) if asked.prompt is not None else ("input_ids", asked.input_ids or []),
        images=asked.image_data,
        sampling=asked.sampling(),
        with_logprobs=bool(asked.return_logprob),
        stream=bool(asked.stream),
        is_cumulative=False,
    )


def _answered(
    request: Request,
    arrived: float,
    *,
    prompt: tuple[str, str | Sequence[int]],
    images: str | list[str] | None,
    sampling: TokenNativeSampling,
    with_logprobs: bool,
    stream: bool,
    is_cumulative: bool,
    name: str | None = None,
) -> Response:
    model = service_of(request).default_model()
    n = sampling.n or 1
    if stream and n > 1:
        raise InvalidRequest("n can't be streamed here; want 1.", param="sampling_params.n")
    raw = RawRequest(
        id=Head.new("gen", model.name).id,
        inputs=prompt[1],
        field=prompt[0],
        sources=_sources(images, model),
        images_field="image_data",
        sampling=_sampling_of(sampling, model, with_logprobs=with_logprobs),
        options=_text_options_of(sampling, model),
        grammar=sampling.grammar(),
        n=n,
    )
    dialect = TokenNativeDialect(name or raw.id, arrived, with_logprobs=with_logprobs, is_cumulative=is_cumulative)
    return Exchange(lambda client: answer_raw(client, model, raw, dialect, arrived, stream=stream))


def _ids(given: list[Any] | None) -> list[int]:
    ids = [one for one in given or () if isinstance(one, int) and not isinstance(one, bool)]
    if len(ids) != len(given or ()):
        raise InvalidRequest("input_ids: want a list of numbers.", param="input_ids")
    return ids


def _sources(images: str | list[str] | None, model: ServedModel) -> list[ImageSource]:
    given = [images] if isinstance(images, str) else images or []
    if given and model.image is None:
        raise InvalidRequest("This model reads text only; remove the images.", param="image_data")
    return [
        ImageSource(one if _IS_URL.match(one) else base64_url(one), f"image_data[{index}]")
        for index, one in enumerate(given)
    ]


def _sampling_of(asked: TokenNativeSampling, model: ServedModel, *, with_logprobs: bool) -> SamplingParams:
    max_tokens, min_tokens = asked.max_new_tokens or DEFAULT_NEW_TOKENS, asked.min_new_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_new_tokens ({min_tokens}) is larger than max_new_tokens ({max_tokens}).",
            param="sampling_params.min_new_tokens",
        )
    stop_token_ids = tuple(dict.fromkeys(asked.stop_token_ids or ()))
    check_token_ids(stop_token_ids, model.tokenizer, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=max(asked.top_k or 0, 0),
        top_p=asked.top_p or 1.0,
        min_p=asked.min_p or 0.0,
        seed=secrets.randbits(62) if asked.sampling_seed is None else asked.sampling_seed,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(asked.ignore_eos),
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        logprobs=0 if with_logprobs else None,
    )


def _text_options_of(asked: TokenNativeSampling, model: ServedModel) -> TextOptions:
    return TextOptions(
        stop=stop_strings(asked.stop, model),
        min_tokens=asked.min_new_tokens or 0,
        skip_special_tokens=asked.skip_special_tokens is not False,
        include_stop=bool(asked.no_stop_trim),
        stop_token_ids=frozenset(asked.stop_token_ids or ()),
        continues_prompt=True,
        with_pieces=True,
    )


class TokenNativeDialect(ServerSent):
    """Words of both.

    Args:
        name: id of the answer.
        arrived: `time.perf_counter()` when the request came.
        with_logprobs: tell those of the answer's tokens.
        is_cumulative: events hold everything so far.
    """

    tells_every_token = True

    def __init__(self, name: str, arrived: float, *, with_logprobs: bool, is_cumulative: bool) -> None:
        self._name = name
        self._arrived = arrived
        self._with_logprobs = with_logprobs
        self._is_cumulative = is_cumulative
        self._text = ""
        self._pieces: list[Piece] = []
        self._made = 0
        self._prompt_tokens = 0
        self._held: tuple[str, list[Piece]] = ("", [])
        """What the last event tells."""

    def opening(self, index: int) -> bytes:
        """Nothing."""
        return b""

    def chunk(self, index: int, news: News) -> bytes:
        """New text with its tokens. What comes with the end is told there."""
        self._prompt_tokens = news.prompt_tokens
        if news.is_last:
            self._held = news.text, list(news.pieces)
            return b""
        return self._event(news.text, list(news.pieces), None)

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """The last of it, with the reason."""
        self._prompt_tokens = news.prompt_tokens
        return self._event(*self._held, answer)

    def end(self, usage: Usage) -> bytes:
        """The word that ends streams."""
        return DONE

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> Any:
        """One answer, or a list of several."""
        cached = usage.prompt_tokens_details.cached_tokens
        latency = time.perf_counter() - self._arrived
        told = [
            TokenNativeAnswer(
                one.text,
                [piece.token_id for piece in one.pieces],
                MetaInfo(
                    self._name if len(answers) == 1 else f"{self._name}-{index}",
                    _reason(one),
                    usage.prompt_tokens,
                    one.completion_tokens,
                    cached,
                    self._logprobs(one.pieces),
                    latency,
                ),
            )
            for index, one in enumerate(answers)
        ]
        return told[0] if len(told) == 1 else told

    def _event(self, text: str, pieces: list[Piece], answer: Answer | None) -> bytes:
        self._made += len(pieces)
        if self._is_cumulative:
            self._text += text
            self._pieces += pieces
            text, pieces = self._text, self._pieces
        reason = None if answer is None else _reason(answer)
        info = MetaInfo(self._name, reason, self._prompt_tokens, self._made, UNSET, self._logprobs(pieces))
        return server_sent(TokenNativeAnswer(text, [piece.token_id for piece in pieces], info))

    def _logprobs(self, pieces: Sequence[Piece]) -> list[tuple[float, int, None]] | UnsetType:
        if not self._with_logprobs:
            return UNSET
        return [(finite(piece.logprob), piece.token_id, None) for piece in pieces]


def _reason(answer: Answer) -> dict[str, Any]:
    assert answer.finish_reason is not None
    found: dict[str, Any] = {"type": answer.finish_reason.value}
    if answer.finish_reason.value == "length":
        return found | {"length": answer.completion_tokens}
    return found if answer.stop_reason is None else found | {"matched": answer.stop_reason}
