"""Bodies of LightLLM's native endpoints, which are TGI's too, as structs that decode and check types at once.

Unknown keys are ignored, as there. What is known and can't be served is refused by name when it is not at the value
that changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from epd.errors import InvalidRequest

MAX_BEST_OF = 8
MAX_STOP_SEQUENCES = 10
MAX_STOP_TOKENS = 256
MAX_ALLOWED_TOKENS = 256
DEFAULT_NEW_TOKENS = 16

_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Samples = Annotated[int, Meta(ge=1, le=MAX_BEST_OF)]
_Penalty = Annotated[float, Meta(ge=0, le=100)]
_TGI_ONLY = (
    *("details", "decoder_input_details", "return_full_text", "truncate", "watermark"),
    *("typical_p", "top_n_tokens", "adapter_id", "grammar"),
)

_LIGHTLLM_ONLY = (
    *("n", "presence_penalty", "ignore_eos", "min_new_tokens", "stop_sequences", "regular_constraint"),
    *("guided_grammar", "guided_json", "allowed_token_ids", "skip_special_tokens", "add_special_tokens"),
    *("add_spaces_between_special_tokens", "print_eos_token", "return_details", "input_penalty"),
    *("exponential_decay_length_penalty", "image_max_patch_num"),
)


class NativeMedium(msgspec.Struct):
    """A picture."""

    type: Annotated[str, Meta(description="url or base64; for /tokens image_size too", examples=["url"])]
    data: Annotated[
        Any,
        Meta(description="an http(s) URL, bare base64, or [width, height]", examples=["https://example.com/a.png"]),
    ] = None


class MultimodalParams(msgspec.Struct):
    """What comes with a prompt."""

    images: list[NativeMedium] | None = None
    audios: list[Any] | None = None


class TGIGrammar(msgspec.Struct):
    """What an answer must look like, in TGI's words."""

    type: Annotated[str, Meta(description="json or regex")]
    value: Any


class NativeParameters(msgspec.Struct, kw_only=True):
    """Of generation. `null` is the same as leaving a key out."""

    best_of: Annotated[_Samples | None, Meta(description="answers to one prompt; all are given")] = None
    n: Annotated[_Samples | None, Meta(description="the same as best_of")] = None
    do_sample: Annotated[bool | None, Meta(description="false: greedy; default: the model's own, else false")] = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=1, le=100)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None, Meta(description="-1: all; never 0")] = None
    ignore_eos: bool | None = None
    max_new_tokens: Annotated[
        _Positive | None, Meta(description="16 by default; must fit behind the prompt", examples=[64])
    ] = None
    min_new_tokens: Annotated[_Positive | None, Meta(description="tokens at least, the one that ends it included")] = (
        None
    )
    stop_sequences: Annotated[
        str | list[str | list[_TokenId]] | None,
        Meta(
            description=f"up to {MAX_STOP_SEQUENCES} texts or rows of tokens that end the answer, and stay in it",
            examples=[["\n\n"]],
        ),
    ] = None
    regular_constraint: Annotated[
        str | None, Meta(description="a regular expression of the whole answer", examples=["yes|no"])
    ] = None
    guided_grammar: Annotated[str | None, Meta(description="a context-free grammar")] = None
    guided_json: Annotated[str | dict[str, Any] | None, Meta(description="a JSON schema, as text or as it is")] = None
    allowed_token_ids: list[_TokenId] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: Annotated[bool | None, Meta(description="around the prompt; default: true")] = None
    add_spaces_between_special_tokens: Annotated[
        bool | None, Meta(description="for slow tokenizers; has no effect on the fast ones that are used here")
    ] = None
    print_eos_token: bool | None = None
    return_details: Annotated[bool | None, Meta(description="tell the tokens; not in streams, which do so anyway")] = (
        None
    )
    seed: Annotated[
        Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None,
        Meta(description="the same seed gives the same answer; -1: draw one"),
    ] = None
    exponential_decay_length_penalty: Annotated[Any, Meta(description="refused, unless it changes nothing")] = None
    input_penalty: Annotated[Any, Meta(description="refused, unless it changes nothing")] = None
    image_max_patch_num: Annotated[Any, Meta(description="refused, unless it changes nothing")] = None
    group_request_id: Annotated[Any, Meta(description="refused, unless it changes nothing")] = None
    suggested_dp_index: Annotated[Any, Meta(description="refused, unless it changes nothing")] = None
    move_kv_to_decode_node: Annotated[Any, Meta(description="refused, unless it changes nothing")] = None
    stop: Annotated[str | list[str] | None, Meta(description="TGI's name of stop_sequences")] = None
    details: bool | UnsetType | None = UNSET
    decoder_input_details: bool | UnsetType | None = UNSET
    return_full_text: Annotated[bool | UnsetType | None, Meta(description="begin the text with the prompt")] = UNSET
    truncate: Annotated[_Positive | UnsetType | None, Meta(description="keep so many last tokens of a text")] = UNSET
    watermark: bool | UnsetType | None = UNSET
    typical_p: float | UnsetType | None = UNSET
    top_n_tokens: int | UnsetType | None = UNSET
    adapter_id: Any = UNSET
    grammar: TGIGrammar | UnsetType | None = UNSET

    @property
    def is_tgi(self) -> bool:
        """Whether a key is there that only TGI has."""
        return any(getattr(self, name) is not UNSET for name in _TGI_ONLY)

    @property
    def is_lightllm(self) -> bool:
        """Whether a key has a value that TGI does not know."""
        return any(getattr(self, name) is not None for name in _LIGHTLLM_ONLY)

    def check(self) -> None:
        """Refuse what contradicts itself and what can't be served.

        Raises:
            InvalidRequest: the first such field.
        """
        for name, is_used in self._unsupported().items():
            if is_used:
                raise InvalidRequest(
                    f"parameters.{name} is not supported by this server with this value; leave it out.",
                    param=f"parameters.{name}",
                )
        if self.n is not None and self.best_of is not None and self.n != self.best_of:
            raise InvalidRequest(f"n ({self.n}) and best_of ({self.best_of}) must be equal.", param="parameters.n")
        if self.top_k == 0:
            raise InvalidRequest("top_k is 0; want -1 for all, or at least 1.", param="parameters.top_k")
        if (self.min_new_tokens or 1) > (self.max_new_tokens or DEFAULT_NEW_TOKENS):
            raise InvalidRequest(
                f"min_new_tokens ({self.min_new_tokens}) is larger than max_new_tokens "
                f"({self.max_new_tokens or DEFAULT_NEW_TOKENS}).",
                param="parameters.min_new_tokens",
            )

    def _unsupported(self) -> dict[str, bool]:
        """Field → whether its value asks for something that can't be served."""
        decay = self.exponential_decay_length_penalty
        return {
            "exponential_decay_length_penalty": decay is not None and not _is_no_decay(decay),
            "input_penalty": bool(self.input_penalty),
            "image_max_patch_num": self.image_max_patch_num not in (None, -1),
            "group_request_id": self.group_request_id not in (None, -1),
            "suggested_dp_index": self.suggested_dp_index not in (None, -1),
            "move_kv_to_decode_node": self.move_kv_to_decode_node is not None,
            "decoder_input_details": bool(self.decoder_input_details),
            "watermark": bool(self.watermark),
            "typical_p": self.typical_p not in (None, UNSET, 1),
            "top_n_tokens": bool(self.top_n_tokens),
            "adapter_id": bool(self.adapter_id),
        }

    @property
    def samples(self) -> int:
        """Answers to the prompt."""
        return self.best_of or self.n or 1


def _is_no_decay(value: Any) -> bool:
    """Whether `exponential_decay_length_penalty` grows by a factor of 1, from wherever it starts."""
    return isinstance(value, list) and len(value) == 2 and value[1] == 1


class NativeRequest(msgspec.Struct):
    """`POST /generate` and `/generate_stream` of LightLLM."""

    inputs: Annotated[
        str | list[_TokenId],
        Meta(description="the prompt as it is, markers for pictures included", examples=["What is AI?"]),
    ]
    parameters: NativeParameters | None = None
    multimodal_params: MultimodalParams | None = None
    stream: Annotated[bool | None, Meta(description="for POST /, which is both endpoints")] = None


class CountRequest(msgspec.Struct):
    """`/tokens`."""

    text: str
    parameters: NativeParameters | None = None
    multimodal_params: MultimodalParams | None = None
