"""Conversations of other APIs, item by item, to the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxy.api.field_names import FieldNames
from proxy.api.openai.schema import CalledFunction, ChatMessage, ContentPart, ImageURL, MessageCall

Said = tuple[ContentPart, str]
"""Part of a message, and the client's name of its place."""


def shown(url: str, detail: str | None = None) -> ContentPart:
    """A picture."""
    return ContentPart("image_url", image_url=ImageURL(url, detail))


class Turns:
    """Messages as they come to be.

    Chat templates have a place for pictures in turns of the user alone: those that a tool gave back are shown in one
    behind its text.

    Args:
        names: learns where everything comes from.
    """

    def __init__(self, names: FieldNames) -> None:
        self.messages: list[ChatMessage] = []
        self._names = names
        self._shown: list[Said] = []
        """Pictures that tools gave back."""
        self._takes_calls = False
        """Whether a call belongs to the last message."""

    def say(self, role: str, content: str | Sequence[Said], where: str) -> None:
        """A message; `where` is the client's name of it."""
        if role == "user" and self._shown and not isinstance(content, str):
            content, self._shown = [*self._shown, *content], []
        self._show()
        if isinstance(content, str):
            self._add(ChatMessage(role, content), where)
            return
        field = self._add(ChatMessage(role, [part for part, _ in content]), where)
        for index, (_, place) in enumerate(content):
            self._names.note(f"{field}.content[{index}]", place)

    def reply(self, text: str, where: str) -> None:
        """What the assistant said."""
        self._show()
        self._add(ChatMessage("assistant", text), where)
        self._takes_calls = True

    def call(self, call_id: str | None, name: str, arguments: str | dict[str, Any], where: str, id_field: str) -> None:
        """A call of a tool, in the assistant's turn that has just been, if there is one."""
        self._show()
        if not self._takes_calls:
            self._add(ChatMessage("assistant"), where)
            self._takes_calls = True
        last = self.messages[-1]
        if last.tool_calls is None:
            last.tool_calls = []
        field = f"messages[{len(self.messages) - 1}].tool_calls[{len(last.tool_calls)}]"
        self._names.note(field, where)
        self._names.note(f"{field}.id", f"{where}.{id_field}")
        last.tool_calls.append(MessageCall(CalledFunction(name, arguments), call_id))

    def result(self, call_id: str | None, content: Sequence[Said], where: str, id_field: str) -> None:
        """What a tool gave back."""
        texts = [part.text or "" for part, _ in content if part.image_url is None]
        field = self._add(ChatMessage("tool", "\n".join(texts), tool_call_id=call_id), where)
        self._names.note(f"{field}.tool_call_id", f"{where}.{id_field}")
        self._shown += [one for one in content if one[0].image_url is not None]

    def finish(self) -> list[ChatMessage]:
        """All messages."""
        self._show()
        return self.messages

    def _show(self) -> None:
        if self._shown:
            said, self._shown = self._shown, []
            self.say("user", said, said[0][1])

    def _add(self, message: ChatMessage, where: str) -> str:
        """Returns our name of the message."""
        self._takes_calls = False
        field = f"messages[{len(self.messages)}]"
        self.messages.append(message)
        self._names.note(field, where)
        return field
