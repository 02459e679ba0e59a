"""Tool calls of earlier turns and their results, as chat templates expect them."""

from __future__ import annotations

from typing import Any

import msgspec

from epd.errors import InvalidRequest
from proxy.api.json_values import MAX_VALUES, count_values
from proxy.api.openai.schema import CalledFunction, ChatMessage, ContentPart, MessageCall
from proxy.text.user_text import Message
from proxy.tools.calls import short_id


class CallHistory:
    """Calls of one conversation, in the order of its messages.

    Args:
        has_short_ids: the template takes ids of nine letters and digits alone; others are changed, calls and results
            alike.
    """

    def __init__(self, *, has_short_ids: bool) -> None:
        self._has_short_ids = has_short_ids
        self._names: dict[str, str] = {}
        self._last_function = ""
        self._values_left = MAX_VALUES
        """That arguments may have."""

    def called(self, message: ChatMessage, where: str) -> dict[str, Any]:
        """What the calls of a turn add to its message.

        Raises:
            InvalidRequest: it is not the assistant's, or a call has no id.
        """
        calls = [(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls or ())]
        if message.function_call is not None:
            self._last_function = f"call_{len(self._names)}"
            calls.append((f"{where}.function_call", MessageCall(message.function_call, self._last_function)))
        if not calls:
            return {}
        if message.role != "assistant":
            field = f"{where}.tool_calls" if message.tool_calls else f"{where}.function_call"
            raise InvalidRequest(f"{field}: only the assistant calls tools.", param=field)
        return {"tool_calls": [self._call(call, field) for field, call in calls]}

    def _call(self, call: MessageCall, where: str) -> dict[str, Any]:
        if call.type not in (None, "function"):
            raise InvalidRequest(f"{where}.type: {call.type[:100]!r} is not function.", param=f"{where}.type")
        if not call.id:
            raise InvalidRequest(f"{where}.id is missing.", param=f"{where}.id")
        self._names[call.id] = call.function.name
        function = {"name": call.function.name, "arguments": self._arguments(call.function)}
        return {"id": self._id(call.id), "type": "function", "function": function}

    def _arguments(self, function: CalledFunction) -> dict[str, Any] | str:
        """As an object, which templates go through or print; as text, where it is none, or a very large one."""
        given = function.arguments
        if isinstance(given, str):
            try:
                found = msgspec.json.decode(given) if given.strip() else {}
            except (msgspec.DecodeError, UnicodeError, RecursionError):
                return given
            return found if isinstance(found, dict) and self._may_go_through(found) else given
        if not self._may_go_through(given):
            return msgspec.json.encode(given).decode()
        return {} if given is None else given

    def _may_go_through(self, value: Any) -> bool:
        try:
            self._values_left -= count_values(value, self._values_left)
        except ValueError:
            return False
        return True

    def result(self, message: ChatMessage, where: str) -> Message:
        """The message of a tool, or, as it was called once, of a function.

        Raises:
            InvalidRequest: it answers no call, or is no text.
        """
        is_old = message.role == "function"
        call_id = self._last_function if is_old else message.tool_call_id
        field = f"{where}.role" if is_old else f"{where}.tool_call_id"
        if not call_id and not is_old:
            raise InvalidRequest(f"{field} is missing: it says which call of the assistant this answers.", param=field)
        if call_id is None or call_id not in self._names:
            called = "function_call" if is_old else "tool_calls"
            raise InvalidRequest(f"{field}: no earlier message of the assistant has such {called}.", param=field)
        return {
            "role": "tool",
            "content": _text(message.content, where),
            "tool_call_id": self._id(call_id),
            "name": message.name or self._names[call_id],
        }

    def _id(self, call_id: str) -> str:
        return short_id(call_id) if self._has_short_ids else call_id


def _text(content: str | list[ContentPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        if part.type not in (None, "text") or part.text is None:
            field = f"{where}.content[{i}]"
            raise InvalidRequest(f"{field}: results of tools are text; send text parts.", param=field)
        texts.append(part.text)
    return "\n".join(texts)
