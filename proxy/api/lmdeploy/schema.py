"""Bodies of LMDeploy's native endpoints, and their answers. Keys that are not here have no effect."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from proxy.api.openai.schema import ChatMessage, ChatRequest, ContentPart, ImageURL

_T = TypeVar("_T")

DEFAULT_OUTPUT_LEN = 512

_SessionId = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class _Native(msgspec.Struct, kw_only=True):
    """What both endpoints take. null is the same as nothing."""

    prompt: Annotated[
        str | Annotated[list[ChatMessage], Meta(min_length=1)],
        Meta(description="what the user says next, which may be nothing; or messages", examples=["Hello!"]),
    ] = ""
    session_id: Annotated[
        _SessionId | None,
        Meta(description="of the conversation; -1, the default: the one of this client's host", examples=[7]),
    ] = None
    instance_id: Annotated[_SessionId | None, Meta(description="the same as session_id", examples=[7])] = None
    stream: Annotated[bool | None, Meta(description="tell the answer as it comes, in frames", examples=[True])] = None
    request_output_len: Annotated[
        _Positive | None,
        Meta(
            description=f"tokens to generate at most; default: {DEFAULT_OUTPUT_LEN}, on /v1/chat/interactive what the "
            "session has room for",
            examples=[64],
        ),
    ] = None
    top_p: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="the likeliest tokens with this probability together", examples=[0.8]),
    ] = 0.8
    top_k: Annotated[
        Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None,
        Meta(description="so many of the likeliest tokens; 0 or -1: all", examples=[40]),
    ] = 40
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 is greedy", examples=[0.8])
    ] = 0.8
    repetition_penalty: Annotated[
        Annotated[float, Meta(ge=0.01, le=100)] | None, Meta(description="1: none", examples=[1.1])
    ] = 1.0
    ignore_eos: Annotated[
        bool | None,
        Meta(description="the model can't end the answer: it is as long as it may be", examples=[False]),
    ] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="leave control tokens out of the text; default: true", examples=[True])
    ] = None
    renew_session: Annotated[
        bool | None, Meta(description="end the session first, then begin it anew", examples=[True])
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
        Meta(description="default: drawn for each turn", examples=[1]),
    ] = None

    @property
    def session(self) -> int:
        """The number of the session; -1: none was given."""
        given = self.instance_id if self.session_id is None else self.session_id
        return -1 if given is None else given

    def chat(self, *, max_tokens: int | None, stop: str | list[str] | None = None) -> ChatRequest:
        """The same turn in OpenAI's words."""
        messages = [ChatMessage("user", self.prompt)] if isinstance(self.prompt, str) else self.prompt
        return ChatRequest(
            messages=messages,
            stream=self.stream,
            max_tokens=max_tokens,
            top_p=_or(self.top_p, 0.8),
            top_k=_or(self.top_k, 40),
            temperature=_or(self.temperature, 0.8),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            seed=self.seed,
            stop=stop,
            return_token_ids=True,
        )


class LMDeployRequest(_Native, kw_only=True):
    """`POST /generate`."""

    sequence_start: Annotated[
        bool | None,
        Meta(description="true, the default: begin the session; false: go on with it", examples=[False]),
    ] = None
    sequence_end: Annotated[
        bool | None, Meta(description="end the session with this answer; default: false", examples=[True])
    ] = None
    stop: Annotated[
        bool | None,
        Meta(description="stop the answer that the session is getting; answer nothing", examples=[False]),
    ] = None


class InteractiveRequest(_Native, kw_only=True):
    """`POST /v1/chat/interactive`."""

    image_url: Annotated[
        str | ImageURL | list[str | ImageURL] | None,
        Meta(description="pictures before the prompt; not in sessions", examples=["https://example.com/a.png"]),
    ] = None
    interactive_mode: Annotated[
        bool | None, Meta(description="keep the session for further turns", examples=[True])
    ] = None
    stop: Annotated[
        bool | str | list[str] | None,
        Meta(description="strings that end the answer; true: as cancel", examples=[["\n"]]),
    ] = None
    cancel: Annotated[
        bool | None, Meta(description="stop the answer that the session is getting; answer nothing", examples=[False])
    ] = None
    adapter_name: Annotated[Any, Meta(description="refused: there are no adapters", examples=[None])] = None

    @property
    def images(self) -> list[ContentPart]:
        """The pictures as parts of a message."""
        given = self.image_url
        urls = [] if given is None else given if isinstance(given, list) else [given]
        return [ContentPart("image_url", image_url=url) for url in urls]


class LMDeployAnswer(msgspec.Struct):
    """The answer, and each frame of a stream, where the text is what is new."""

    text: Annotated[str, Meta(examples=["Hello!"])]
    tokens: Annotated[int, Meta(description="of the answer so far", examples=[3])]
    finish_reason: Annotated[
        str | None, Meta(description="stop or length; error with `error`; null before the end", examples=["stop"])
    ]
    input_tokens: Annotated[
        int | UnsetType, Meta(description="that this turn added before its answer", examples=[10])
    ] = UNSET
    history_tokens: Annotated[int | UnsetType, Meta(description="that the session had before", examples=[22])] = UNSET
    session_id: Annotated[int | UnsetType, Meta(description="as it was asked for", examples=[7])] = UNSET
    session_exceeded: Annotated[
        bool | UnsetType, Meta(description="true: the session is full; begin a new one, or send renew_session: true")
    ] = UNSET
    error: Annotated[dict[str, Any] | UnsetType, Meta(description="what went wrong, in the last frame of a stream")] = (
        UNSET
    )


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
