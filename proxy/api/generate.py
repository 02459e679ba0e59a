"""`POST /generate`: one path that servers with different words share. The keys of the body say which one is meant.

    inputs                                     → LightLLM, or TGI by its parameters   (`lightllm.endpoints`)
    prompt, old keys or nothing else           → LMDeploy of 2023, with sessions      (`lmdeploy.endpoints`)
    prompt or input_ids with newer keys        → LMDeploy of today                    (`lightllm.token_native`)
    text, or input_ids with sampling_params    → SGLang
    anything else                              → 400, which names the keys

A field `model` has no meaning on this path, whoever is meant: what is asked is the default model.
"""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from msgspec import UNSET, Raw, Struct, UnsetType
from starlette.responses import Response

from epd.errors import InvalidRequest
from proxy.api.json_body import decode_keys
from proxy.api.lightllm import endpoints as lightllm
from proxy.api.lightllm import token_native
from proxy.api.lightllm.answer import NativeAnswer, TGIAnswer
from proxy.api.lightllm.docs import native_documentation
from proxy.api.lightllm.schema import NativeRequest
from proxy.api.lightllm.token_native import TokenNativeAnswer
from proxy.api.lightllm.token_native_schema import NewLMDeployRequest, SGLangRequest
from proxy.api.lmdeploy import endpoints as lmdeploy
from proxy.api.lmdeploy.schema import LMDeployAnswer, LMDeployRequest
from proxy.api.requests import read_request
from proxy.request_context import check_share

router = APIRouter(tags=["LightLLM", "TGI", "LMDeploy", "SGLang"])

DOCUMENTED = (SGLangRequest, NewLMDeployRequest, TokenNativeAnswer)  # the others are documented where they are served

_OLD_LMDEPLOY = ("instance_id", "sequence_start", "sequence_end", "request_output_len")
_NEW_LMDEPLOY = (
    *("max_tokens", "stop_token_ids", "return_logprob", "image_data", "min_p"),
    "include_stop_str_in_output",
)
_ACCEPTED = "Send inputs with parameters (LightLLM, TGI), prompt (LMDeploy), or text with sampling_params (SGLang)."


class _Keys(Struct):
    """The keys that tell dialects apart. Their values stay as they came: looking costs no decoding."""

    inputs: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    text: Raw | UnsetType = UNSET
    input_ids: Raw | UnsetType = UNSET
    sampling_params: Raw | UnsetType = UNSET
    instance_id: Raw | UnsetType = UNSET
    sequence_start: Raw | UnsetType = UNSET
    sequence_end: Raw | UnsetType = UNSET
    request_output_len: Raw | UnsetType = UNSET
    max_tokens: Raw | UnsetType = UNSET
    stop_token_ids: Raw | UnsetType = UNSET
    return_logprob: Raw | UnsetType = UNSET
    image_data: Raw | UnsetType = UNSET
    min_p: Raw | UnsetType = UNSET
    include_stop_str_in_output: Raw | UnsetType = UNSET

    def has(self, *names: str) -> list[str]:
        """Those of the keys that the body gives a value; null is none."""
        values = {name: getattr(self, name) for name in names}
        return [name for name, value in values.items() if value is not UNSET and bytes(value) != b"null"]


_OPENAPI = native_documentation(
    bodies=(NativeRequest, LMDeployRequest, NewLMDeployRequest, SGLangRequest),
    answers=(NativeAnswer, TGIAnswer, LMDeployAnswer, TokenNativeAnswer),
    lists_of=(TokenNativeAnswer,),
    stream="text/event-stream",
)


@router.post("/generate", response_model=None, openapi_extra=_OPENAPI)
async def generate(request: Request) -> Response:
    """Continue a text, in the words of LightLLM, TGI, LMDeploy or SGLang: the keys of the body decide."""
    arrived = time.perf_counter()
    body = await read_request(request)
    keys = decode_keys(body, _Keys)
    prompts, old, new = keys.has("inputs", "prompt", "text", "input_ids"), *_lmdeploy_keys(keys)
    if len(prompts) != 1:
        problem = f"{' and '.join(prompts)} are of different dialects" if prompts else "There is no prompt"
        raise InvalidRequest(f"{problem}. {_ACCEPTED}", param=prompts[-1] if prompts else "inputs")
    if prompts != ["prompt"] or new:
        check_share()
    if prompts == ["inputs"]:
        return await lightllm.answer(request, body, arrived)
    if prompts == ["text"] or (prompts == ["input_ids"] and keys.has("sampling_params")):
        return await token_native.answer_sglang(request, body, arrived)
    if old and new:
        raise InvalidRequest(
            f"{new[0]} and {old[0]} are of different versions of LMDeploy; leave one of them out.", param=new[0]
        )
    if new or prompts == ["input_ids"]:
        return await token_native.answer_new_lmdeploy(request, body, arrived)
    return await lmdeploy.answer(request, body, arrived)


def _lmdeploy_keys(keys: _Keys) -> tuple[list[str], list[str]]:
    return keys.has(*_OLD_LMDEPLOY), keys.has(*_NEW_LMDEPLOY)
