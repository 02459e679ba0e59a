"""Bodies of LMDeploy's native endpoints, and their answers. Keys that are not here have no effect."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from proxy.api.openai_schema import ChatMessage, ChatRequest, ContentPart, ImageURL

_T = TypeVar("_T")

DEFAULT_OUTPUT_LEN = 512

_SessionId = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class _Native(msgspec.Struct, kw_only=True):
    """What both endpoints take. null is the same as nothing."""

    prompt: Annotated[
        str | list[ChatMessage], Meta(description="what the user says next, which may be nothing; or messages")
    ] = ""
    session_id: Annotated[
        _SessionId | None, Meta(description="of the conversation; -1: the one of this client's host")
    ] = None
    instance_id: Annotated[_SessionId | None, Meta(description="the same as session_id")] = None
    stream: bool | None = None
    request_output_len: Annotated[_Positive | None, Meta(description="tokens to generate at most")] = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = 0.8
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None, Meta(description="0 or -1: all")] = 40
    temperature: Annotated[Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 is greedy")] = 0.8
    repetition_penalty: Annotated[Annotated[float, Meta(ge=0.01, le=100)] | None, Meta(description="1: none")] = 1.0
    ignore_eos: Annotated[
        bool | None, Meta(description="the model can't end the answer: it is as long as it may be")
    ] = None
    skip_special_tokens: bool | None = None
    renew_session: Annotated[bool | None, Meta(description="end the session first, then begin it anew")] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None, Meta(description="default: drawn for each turn")
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
        bool | None, Meta(description="true, the default: begin the session; false: go on with it")
    ] = None
    sequence_end: Annotated[bool | None, Meta(description="end the session with this answer")] = None
    stop: Annotated[bool | None, Meta(description="stop the answer that the session is getting; answer nothing")] = None


class InteractiveRequest(_Native, kw_only=True):
    """`POST /v1/chat/interactive`."""

    image_url: Annotated[
        str | ImageURL | list[str | ImageURL] | None, Meta(description="pictures before the prompt; not in sessions")
    ] = None
    interactive_mode: Annotated[bool | None, Meta(description="keep the session for further turns")] = None
    stop: Annotated[bool | str | list[str] | None, Meta(description="strings that end the answer; true: as cancel")] = (
        None
    )
    cancel: Annotated[bool | None, Meta(description="stop the answer that the session is getting")] = None
    adapter_name: Any = None

    @property
    def images(self) -> list[ContentPart]:
        """The pictures as parts of a message."""
        given = self.image_url
        urls = [] if given is None else given if isinstance(given, list) else [given]
        return [ContentPart("image_url", image_url=url) for url in urls]


class LMDeployAnswer(msgspec.Struct):
    """The answer, and each frame of a stream, where the text is what is new."""

    text: str
    tokens: Annotated[int, Meta(description="of the answer so far")]
    finish_reason: Annotated[str | None, Meta(description="stop or length; null before the end")]
    input_tokens: Annotated[int | UnsetType, Meta(description="that this turn added before its answer")] = UNSET
    history_tokens: Annotated[int | UnsetType, Meta(description="that the session had before")] = UNSET
    session_id: int | UnsetType = UNSET
    session_exceeded: Annotated[
        bool | UnsetType, Meta(description="true: the session is full; begin a new one, or send renew_session: true")
    ] = UNSET
    error: dict[str, Any] | UnsetType = UNSET


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
