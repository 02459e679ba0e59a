"""Answers in the words of OpenAI's Responses API: whole, and as named events.

    response.created, response.in_progress
    for each item in turn:
        response.output_item.added
        a message:  content_part.added, output_text.delta…, output_text.done, content_part.done
        a call:     function_call_arguments.delta…, function_call_arguments.done
        response.output_item.done
    response.completed | response.incomplete | error, response.failed

Items follow each other: text behind a call is a message of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import UnsetType
from msgspec.structs import replace

from epd.errors import ClientError, EPDError, InvalidImage, MediaForbidden, MediaUnavailable, Overloaded
from epd.types import FinishReason
from proxy.api.dialect import Head, News, ServerSent, Timings, named_event, unguessable
from proxy.api.field_names import FieldNames
from proxy.api.http import error_body
from proxy.api.openai.answer import Wanted
from proxy.api.openai.logprobs import chat_logprobs
from proxy.api.openai.objects import TokenLogprob, Usage
from proxy.api.responses.object import (
    ArgumentsDelta,
    ArgumentsDone,
    Completed,
    Created,
    ErrorEvent,
    Event,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputTokensDetails,
    ItemAdded,
    ItemDone,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    PartAdded,
    PartDone,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    TextDelta,
    TextDone,
)
from proxy.api.responses.schema import ResponsesRequest
from proxy.models.served_model import ServedModel
from proxy.text.answer import Answer, ShownToken
from proxy.tools.calls import CallDelta

E = TypeVar("E", bound=Event)


def response_of(request: ResponsesRequest, model: ServedModel, head: Head) -> ResponseObject:
    """The response as it begins."""
    defaults, text = model.sampling_defaults, request.text
    asked = text.format if text is not None else None
    return ResponseObject(
        id=head.id,
        created_at=head.created,
        model=head.model,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_logprobs=request.top_logprobs or 0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        text={"format": {"type": "text"} if asked is None else _given(asked)},
        tools=[{"parameters": None, "strict": False} | _given(tool) for tool in request.tools or ()],
        tool_choice=request.tool_choice or "auto",
        parallel_tool_calls=request.parallel_tool_calls is not False,
        reasoning={"effort": request.reasoning.effort if request.reasoning is not None else None, "summary": None},
        truncation=request.truncation or "disabled",
        metadata=request.metadata or {},
        user=request.user,
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
    )


def _given(value: msgspec.Struct) -> dict[str, Any]:
    return {name: given for name, given in msgspec.structs.asdict(value).items() if given is not None}


class ResponsesDialect(ServerSent):
    """`/v1/responses`.

    Args:
        response: as it begins.
        wanted: besides the text.
        names: what the request's fields are called, for errors.
    """

    def __init__(self, response: ResponseObject, wanted: Wanted, names: FieldNames) -> None:
        self._response = response
        self._wanted = wanted
        self._names = names
        self._sequence = 0
        self._items: list[OutputItem] = []
        """Those that were told; the last one may be going on."""
        self._is_open = False
        """Whether it does."""
        self._pieces: list[str] = []
        """Its text or arguments so far: joining them each time would take ever longer."""
        self._reason = FinishReason.STOP

    # -- whole -------------------------------------------------------------------------------------------------------

    def whole(self, answers: Sequence[Answer], usage: Usage, timings: Timings | UnsetType) -> ResponseObject:
        """The answer in one piece."""
        (answer,) = answers
        assert answer.finish_reason is not None
        self._reason = answer.finish_reason
        items: list[OutputItem] = []
        if answer.text or not answer.tool_calls:
            part = OutputText(text=answer.text, logprobs=self._logprobs(answer.logprobs))
            items.append(OutputMessage(id=unguessable("msg_"), status=self._status, content=[part]))
        for call in answer.tool_calls:
            items.append(
                OutputCall(
                    id=unguessable("fc_"),
                    call_id=call.id,
                    name=call.name,
                    arguments=call.arguments,
                    status="completed",
                )
            )
        return self._ended(items, usage)

    @property
    def _status(self) -> ItemStatus:
        return "incomplete" if self._reason is FinishReason.LENGTH else "completed"

    def _ended(self, items: list[OutputItem], usage: Usage) -> ResponseObject:
        is_cut = self._reason is FinishReason.LENGTH
        return replace(
            self._response,
            status="incomplete" if is_cut else "completed",
            incomplete_details=IncompleteDetails() if is_cut else None,
            completed_at=None if is_cut else int(time.time()),
            output=items,
            usage=ResponseUsage(
                usage.prompt_tokens,
                InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
                usage.completion_tokens,
                usage.total_tokens,
            ),
        )

    def _logprobs(self, shown: Sequence[ShownToken]) -> list[TokenLogprob]:
        top = self._wanted.logprobs
        return [] if top is None else chat_logprobs(shown, self._wanted.names, top).content

    # -- stream ------------------------------------------------------------------------------------------------------

    def opening(self, index: int) -> bytes:
        """The response as it begins."""
        return self._tell(Created, response=self._response) + self._tell(InProgress, response=self._response)

    def chunk(self, index: int, news: News) -> bytes:
        """New text, and news of calls."""
        logprobs, told = self._logprobs(news.shown), b""
        for one in news.in_order():
            if isinstance(one, str):
                told += self._text(one, logprobs)
                logprobs = []
            else:
                told += self._call(one)
        return told

    def closing(self, index: int, answer: Answer, news: News, timings: Timings | UnsetType) -> bytes:
        """The last item is over. Where there is none, that is a message without text."""
        assert answer.finish_reason is not None
        self._reason = answer.finish_reason
        told = b"" if self._items else self._begin_message()
        if news.shown and isinstance(message := self._items[-1], OutputMessage) and self._is_open:
            message.content[0].logprobs += self._logprobs(news.shown)
        return told + self._close(self._status)

    def end(self, usage: Usage) -> bytes:
        """The response as it ends."""
        kind = Incomplete if self._reason is FinishReason.LENGTH else Completed
        return self._tell(kind, response=self._ended(self._items, usage))

    def failed(self, error: EPDError) -> bytes:
        """What went wrong, and the response as far as it came."""
        inner = error_body(self._names.rename(error))["error"]
        told = self._tell(ErrorEvent, code=error.code, message=error.message, param=error.param, error=inner)
        if self._is_open:
            self._join()
            self._items[-1].status = "incomplete"
        response = replace(
            self._response,
            status="failed",
            error=ResponseError(_error_code(error), error.message),
            output=self._items,
        )
        return told + self._tell(Failed, response=response)

    # -- items of a stream -------------------------------------------------------------------------------------------

    def _text(self, text: str, logprobs: list[TokenLogprob]) -> bytes:
        told = b""
        if not (self._is_open and isinstance(self._items[-1], OutputMessage)):
            told = self._close() + self._begin_message()
        message = self._items[-1]
        assert isinstance(message, OutputMessage)
        part = message.content[0]
        self._pieces.append(text)
        part.logprobs += logprobs
        return told + self._tell(TextDelta, item_id=message.id, output_index=self._index, delta=text, logprobs=logprobs)

    def _begin_message(self) -> bytes:
        message = OutputMessage(id=unguessable("msg_"), status="in_progress")
        told = self._begin(message)
        part = OutputText(text="")
        message.content.append(part)
        return told + self._tell(PartAdded, item_id=message.id, output_index=self._index, part=part)

    def _call(self, delta: CallDelta) -> bytes:
        told = b""
        if delta.id is not None:
            call = OutputCall(id=unguessable("fc_"), call_id=delta.id, name=delta.name or "", status="in_progress")
            told = self._close() + self._begin(call)
        last = self._items[-1]
        assert isinstance(last, OutputCall)
        if not delta.arguments:
            return told
        self._pieces.append(delta.arguments)
        return told + self._tell(ArgumentsDelta, item_id=last.id, output_index=self._index, delta=delta.arguments)

    def _begin(self, item: OutputItem) -> bytes:
        self._items.append(item)
        self._is_open = True
        return self._tell(ItemAdded, output_index=self._index, item=item)

    def _close(self, status: ItemStatus = "completed") -> bytes:
        """End the item that is going on, if there is one."""
        if not self._is_open:
            return b""
        self._join()
        self._is_open = False
        item, index = self._items[-1], self._index
        if isinstance(item, OutputMessage):
            item.status = status
            (part,) = item.content
            told = self._tell(
                TextDone, item_id=item.id, output_index=index, text=part.text, logprobs=part.logprobs
            ) + self._tell(PartDone, item_id=item.id, output_index=index, part=part)
        else:
            item.status = "completed" if _is_json(item.arguments) else "incomplete"
            told = self._tell(
                ArgumentsDone, item_id=item.id, output_index=index, name=item.name, arguments=item.arguments
            )
        return told + self._tell(ItemDone, output_index=index, item=item)

    def _join(self) -> None:
        item, joined = self._items[-1], "".join(self._pieces)
        self._pieces = []
        if isinstance(item, OutputMessage):
            item.content[0].text = joined
        else:
            item.arguments = joined

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _tell(self, kind: Callable[..., E], **fields: Any) -> bytes:
        event = kind(sequence_number=self._sequence, **fields)
        self._sequence += 1
        return named_event(str(event.__struct_config__.tag), event)


def _is_json(text: str) -> bool:
    """Whether a call is whole: the model may have broken off."""
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _error_code(error: EPDError) -> str:
    """One of those that clients of the API know."""
    match error:
        case Overloaded():
            return "rate_limit_exceeded"
        case InvalidImage():
            return "invalid_image"
        case MediaUnavailable() | MediaForbidden():
            return "failed_to_download_image"
        case ClientError():
            return "invalid_prompt"
    return "server_error"
