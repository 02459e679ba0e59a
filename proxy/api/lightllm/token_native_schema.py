"""Bodies of `/generate` as SGLang and today's LMDeploy have them: one raw prompt, answered with text and tokens."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from epd.errors import InvalidRequest
from epd.types import Grammar, GrammarKind
from proxy.api.openai.schema import MAX_SAMPLES

DEFAULT_NEW_TOKENS = 128
"""In both dialects."""

_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_NOT_SERVED = "is not supported by this server with this value; leave it out."


class TokenNativeSampling(Struct, kw_only=True):
    """`sampling_params` of SGLang; of LMDeploy the same stands in the body itself."""

    max_new_tokens: _Positive | None = None
    min_new_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Annotated[bool | None, Meta(description="has no effect on fast tokenizers")] = None
    no_stop_trim: Annotated[bool | None, Meta(description="show what ended the answer")] = None
    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    sampling_seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    json_schema: Annotated[str | dict[str, Any] | None, Meta(description="a JSON schema, as text or as it is")] = None
    regex: Annotated[str | None, Meta(description="of the whole answer")] = None
    ebnf: Annotated[str | None, Meta(description="a context-free grammar")] = None
    structural_tag: Any = None
    custom_params: Any = None
    logit_bias: Any = None

    def grammar(self) -> tuple[str, Grammar] | None:
        """The field that asks for a form, and the form.

        Raises:
            InvalidRequest: two fields ask for one.
        """
        schema = self.json_schema
        text = schema if isinstance(schema, str | None) else msgspec.json.encode(schema).decode()
        kinds = {
            "json_schema": (GrammarKind.JSON_SCHEMA, text),
            "regex": (GrammarKind.REGEX, self.regex),
            "ebnf": (GrammarKind.EBNF, self.ebnf),
        }
        wanted = [(f"sampling_params.{name}", Grammar(kind, text)) for name, (kind, text) in kinds.items() if text]
        if len(wanted) > 1:
            names = " and ".join(name for name, _ in wanted)
            raise InvalidRequest(f"{names} each ask for a form of the answer; send one of them.", param=wanted[1][0])
        return wanted[0] if wanted else None


class SGLangRequest(Struct, kw_only=True):
    """`POST /generate` of SGLang."""

    text: Annotated[str | list[Any] | None, Meta(description="the prompt as it is")] = None
    input_ids: Annotated[list[Any] | None, Meta(description="or its tokens")] = None
    sampling_params: TokenNativeSampling | list[Any] | None = None
    image_data: Annotated[str | list[str] | None, Meta(description="URLs, or bare base64")] = None
    stream: Annotated[bool | None, Meta(description="events with all text so far, and [DONE] at the end")] = None
    return_logprob: bool | list[Any] | None = None
    rid: Annotated[str | list[Any] | None, Meta(description="id of the answer")] = None
    logprob_start_len: Any = None
    top_logprobs_num: Any = None
    token_ids_logprob: Any = None
    lora_path: Any = None
    input_embeds: Any = None
    video_data: Any = None
    audio_data: Any = None
    session_params: Any = None
    return_hidden_states: Any = None

    def check(self) -> None:
        """Raises InvalidRequest for what can't be served, by name."""
        many = [name for name in ("text", "sampling_params", "return_logprob", "rid") if _is_list(getattr(self, name))]
        if self.input_ids and _is_list(self.input_ids[0]):
            many.append("input_ids")
        if many:
            raise InvalidRequest(f"{many[0]} is a list; send one request for each prompt.", param=many[0])
        used = {name: bool(getattr(self, name)) for name in _SGLANG_REFUSED}
        used["logprob_start_len"] = self.logprob_start_len not in (None, -1)
        _refuse(used)
        if isinstance(self.sampling_params, TokenNativeSampling):
            for name in ("structural_tag", "custom_params", "logit_bias"):
                _refuse({f"sampling_params.{name}": bool(getattr(self.sampling_params, name))})


_SGLANG_REFUSED = (
    *("top_logprobs_num", "token_ids_logprob", "lora_path", "input_embeds", "video_data", "audio_data"),
    *("session_params", "return_hidden_states"),
)


class NewLMDeployRequest(Struct, kw_only=True):
    """`POST /generate` of today's LMDeploy."""

    prompt: Annotated[str | None, Meta(description="the prompt as it is")] = None
    input_ids: Annotated[list[_TokenId] | None, Meta(description="or its tokens")] = None
    image_data: Annotated[str | list[str] | None, Meta(description="URLs, or bare base64")] = None
    return_logprob: bool | None = None
    max_tokens: _Positive | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_TokenId] | None = None
    stream: Annotated[bool | None, Meta(description="events with new text, and [DONE] at the end")] = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Annotated[bool | None, Meta(description="has no effect on fast tokenizers")] = None
    include_stop_str_in_output: bool | None = None
    session_id: Any = None
    return_routed_experts: Any = None

    def check(self) -> None:
        """Raises InvalidRequest for what can't be served, by name."""
        _refuse({name: bool(getattr(self, name)) for name in ("return_routed_experts",)})
        _refuse({"session_id": self.session_id not in (None, -1)})

    def sampling(self) -> TokenNativeSampling:
        """The same in SGLang's names."""
        return TokenNativeSampling(
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            no_stop_trim=self.include_stop_str_in_output,
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _refuse(used: dict[str, bool]) -> None:
    for name, is_used in used.items():
        if is_used:
            raise InvalidRequest(f"{name} {_NOT_SERVED}", param=name)
