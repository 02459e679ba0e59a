"""An answer's text in pieces → its content and its tool calls in pieces, for the formats that models write.

All formats share: text before the first call is content, without the blanks at its end; what may become the beginning
of a call is held back until it is decided; what turns out to be no call is content, letter by letter; a call is told as
soon as it is known to be one, its arguments as they come. However the text is cut into pieces, the same is told.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable

from proxy.tools.calls import CallBroken, CallClosed, CallDelta, Piece, new_id, new_short_id
from proxy.tools.json_scan import BLANKS, BareArguments, CallObject, CallText

_State = Callable[[], bool]

_MOST_BLANKS = 256
"""In front of a call, that are held back: weak models can write them for ever."""
_LONGEST_ID = 64
"""That a model gives a call, in characters."""


class CallParser(ABC):
    """Reads one answer.

    Args:
        max_calls: what comes behind so many calls is dropped, see `is_over`; None: no limit.
    """

    opener: str
    """Begins a call."""

    def __init__(self, max_calls: int | None = None) -> None:
        self.is_over = False
        """Whether the last call that is wanted has ended, and with it the answer."""
        self._max_calls = max_calls
        self._text = ""
        """What came and is not yet decided."""
        self._raw: list[str] = []
        """What belongs to the call that is being read."""
        self._call: CallText = CallObject()
        self._is_told = False
        self._num_calls = 0
        """Told so far."""
        self._has_whole = False
        """Whether one of them is whole."""
        self._is_final = False
        self._pieces: list[Piece] = []
        self._state: _State = self._begin

    def push(self, text: str) -> list[Piece]:
        """What is new after so much more text."""
        self._text += text
        return self._run()

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        self._is_final = True
        return self._run()

    def _run(self) -> list[Piece]:
        while not self.is_over and self._state():
            pass
        if self.is_over:
            self._text = ""
        pieces, self._pieces = self._pieces, []
        return pieces

    # -- states: whether there was something to do -------------------------------------------------------------------

    def _begin(self) -> bool:
        """Of the answer."""
        self._state = self._in_text
        return True

    def _in_text(self) -> bool:
        at = self._text.find(self.opener)
        if at >= 0:
            content = self._text[:at]
            end = _end_of_text(content)
            self._say(content[:end])
            self._raw = [content[end:]]
            self._take(len(self.opener), at)
            self._state = self._after_opener
            return True
        safe = len(self._text) if self._is_final else self._undecided_from()
        if self._is_final and self._has_whole and not self._text.strip():
            safe, self._text = 0, ""  # blanks behind calls
        self._say(self._text[:safe])
        self._text = self._text[safe:]
        return False

    @abstractmethod
    def _after_opener(self) -> bool:
        """What follows it decides whether it was one."""

    def _in_call(self) -> bool:
        self._take(self._call.push(self._text))
        self._tell_call()
        if self._call.is_done or self._call.is_broken:
            self._end_call()
            return True
        if self._is_final:
            self._end_call()
        return False

    @abstractmethod
    def _after_call(self) -> bool:
        """What belongs between calls, or behind the last one."""

    # -- what they do ------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def _take(self, length: int, start: int = 0) -> None:
        """Move what follows `start` to the call's text; what is before is gone."""
        self._raw.append(self._text[start : start + length])
        self._text = self._text[start + length :]

    def _skip_blanks(self) -> str:
        """The letter behind the blanks, which are the call's; empty when it is not there yet."""
        self._take(len(self._text) - len(self._text.lstrip(BLANKS)))
        return self._text[:1]

    def _undecided_from(self) -> int:
        """Where an opener may begin that is not all there, with the blanks before it."""
        return _end_of_text(self._text[: len(self._text) - overlap(self._text, self.opener)])

    def _start_call(self, call: CallText) -> None:
        self._call, self._is_told, self._state = call, False, self._in_call

    def _tell_call(self) -> None:
        if not self._is_told and self._call.is_call:
            self._is_told = True
            self._pieces.append(CallDelta(self._num_calls, self._new_id(), self._call.name))
        if self._is_told and (new := self._call.take()):
            self._pieces.append(CallDelta(self._num_calls, arguments=new))

    def _end_call(self) -> None:
        if not self._is_told or not self._call.is_whole:
            self._give_up()
            return
        self._has_whole = True
        self._pieces.append(CallClosed(self._num_calls))
        self._num_calls += 1
        self._raw = []
        self._state = self._after_call

    def _give_up(self) -> None:
        """It was no call."""
        if self._is_told:
            self._pieces.append(CallBroken(self._num_calls, "".join(self._raw)))
            self._num_calls += 1
        else:
            self._say("".join(self._raw))
        self._raw = []
        self._state = self._in_text

    def _go_on(self, state: _State) -> None:
        """The call and what belongs to it has ended."""
        self._raw = []
        self.is_over = self._max_calls is not None and self._num_calls >= self._max_calls
        self._state = state

    def _new_id(self) -> str:
        return new_id()


class QwenParser(CallParser):
    """`<tool_call>`, an object with name and arguments, `</tool_call>`: Qwen2.5, Qwen3, Hermes."""

    opener = "<tool_call>"
    _closer = "</tool_call>"

    def _after_opener(self) -> bool:
        letter = self._skip_blanks()
        if letter == "{":
            self._start_call(CallObject())
            return True
        if letter or self._is_final:
            self._give_up()
        return bool(letter)

    def _after_call(self) -> bool:
        self._text = self._text.lstrip(BLANKS + "}")  # small models close a brace too many
        if self._text.startswith(self._closer):
            self._text = self._text[len(self._closer) :]
        elif self._closer.startswith(self._text):
            if not self._is_final:
                return False
            self._text = ""
        self._go_on(self._in_text)
        return True


class LlamaParser(CallParser):
    """An object with name and parameters, behind `<|python_tag|>` or at the beginning of the answer; several are joined
    by `;`. Llama 3.1 to 3.3."""

    opener = "<|python_tag|>"

    def _begin(self) -> bool:
        text = self._text.lstrip(BLANKS)
        letter, has_many_blanks = text[:1], len(self._text) - len(text) > _MOST_BLANKS
        if letter == "{" and not has_many_blanks:
            self._skip_blanks()
            self._start_call(CallObject(needs_arguments=True))
        elif letter or has_many_blanks or self._is_final:
            self._state = self._in_text
        else:
            return False
        return True

    def _after_opener(self) -> bool:
        letter = self._skip_blanks()
        if letter == "{":
            self._start_call(CallObject())
        elif letter or self._is_final:
            self._raw.remove(self.opener)  # a call of a built-in tool: code, which is content
            self._give_up()
        return bool(letter)

    def _after_call(self) -> bool:
        rest = self._text.lstrip(BLANKS)
        rest = rest.removeprefix(";").lstrip(BLANKS)
        if len(self._text) - len(rest) > _MOST_BLANKS:
            self._go_on(self._in_text)
            return True
        if rest.startswith("{"):
            self._go_on(self._in_call)
            self._take(len(self._text) - len(rest))
            self._start_call(CallObject(needs_arguments=True))
            return True
        if rest.startswith(self.opener):
            self._text = rest
        elif not rest and not self._is_final and not self._is_last():
            return False
        elif not rest:
            self._text = ""
        elif self.opener.startswith(rest) and not self._is_final:
            return False
        self._go_on(self._in_text)
        return True

    def _is_last(self) -> bool:
        return self._max_calls is not None and self._num_calls >= self._max_calls


class MistralParser(CallParser):
    """`[TOOL_CALLS]` and an array of objects (tokenizers before v11), or for each call `[TOOL_CALLS]`, its name,
    perhaps `[CALL_ID]` and `[ARGS]`, and its arguments."""

    opener = "[TOOL_CALLS]"
    _name = re.compile(r"[\w.:/-]{1,256}")
    _ARGS = "[ARGS]"
    _CALL_ID = "[CALL_ID]"

    def __init__(self, max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._in_array = False
        self._calls_before = 0
        """The array."""
        self._id: str | None = None

    def _after_opener(self) -> bool:
        letter = self._skip_blanks()
        self._in_array, self._calls_before, self._id = letter == "[", self._num_calls, None
        if letter == "[":
            self._take(1)
            self._state = self._in_elements
        elif letter == "{":
            self._start_call(CallObject())
        elif letter and self._name.match(letter):
            self._state = self._in_name
        elif letter or self._is_final:
            self._give_up()
        return bool(letter)

    def _in_elements(self) -> bool:
        """Of the array: at a call or at its end."""
        self._take(len(self._text) - len(self._text.lstrip(BLANKS + ",")))
        letter, is_empty = self._text[:1], self._num_calls == self._calls_before
        if letter == "{":
            self._start_call(CallObject())
        elif letter == "]":
            self._take(1)
            if is_empty:
                self._say("".join(self._raw))
            self._go_on(self._in_text)
        elif letter or (self._is_final and is_empty):
            self._give_up()
        return bool(letter)

    def _in_name(self) -> bool:
        """Name, id and what marks the arguments, which come whole before anything is told."""
        found = self._name.match(self._text)
        assert found is not None  # it began with such a letter
        rest = self._text[found.end() :]
        if rest.startswith(self._CALL_ID):
            call_id, mark, _ = rest[len(self._CALL_ID) :].partition("[")
            if len(call_id) > _LONGEST_ID:
                self._give_up()
                return True
            self._id = call_id.strip()
            rest = rest[len(self._CALL_ID) + len(call_id) :] if mark else ""
        rest = rest.removeprefix(self._ARGS).lstrip(BLANKS)
        if rest.startswith("{"):
            self._take(len(self._text) - len(rest))
            self._start_call(BareArguments(found[0]))
            return True
        may_follow = any(mark.startswith(rest) for mark in (self._ARGS, self._CALL_ID))
        if not may_follow or self._is_final:
            self._give_up()
            return True
        return False

    def _after_call(self) -> bool:
        self._go_on(self._in_elements if self._in_array else self._in_text)
        return True

    def _new_id(self) -> str:
        is_usable = self._id is not None and len(self._id) == 9 and self._id.isascii() and self._id.isalnum()
        return self._id if is_usable and self._id is not None else new_short_id()


def _end_of_text(text: str) -> int:
    """Where the blanks at its end begin, or the last of very many."""
    return max(len(text.rstrip()), len(text) - _MOST_BLANKS)


def overlap(text: str, literal: str) -> int:
    """Length of the longest end of `text` that begins `literal` without being all of it."""
    for length in range(min(len(literal) - 1, len(text)), 0, -1):
        if text.endswith(literal[:length]):
            return length
    return 0
