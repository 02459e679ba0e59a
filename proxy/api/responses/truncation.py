"""`truncation: "auto"`: a conversation that is too long loses its oldest turns.

A turn begins with what the user says, and has all up to the next: answers, calls and what they gave back. Instructions
at the beginning stay, and so does the last turn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from epd.errors import ContextLengthExceeded
from proxy.api.answering import prompt_alone
from proxy.api.field_names import FieldNames
from proxy.api.http import Client
from proxy.api.openai.schema import ChatMessage, ChatRequest
from proxy.api.requests import Deadline
from proxy.models.served_model import ServedModel


async def answer_what_fits(
    client: Client,
    model: ServedModel,
    chat: ChatRequest,
    names: FieldNames,
    arrived: float,
    answer: Callable[[ChatRequest], Awaitable[object]],
) -> None:
    """Answer a conversation, or as much of its end as fits.

    Args:
        client: to be answered.
        model: that is asked.
        chat: the whole conversation.
        names: learns what is left out.
        arrived: `time.perf_counter()` when it came.
        answer: answers a conversation.

    Raises:
        EPDError: nothing was told; `ContextLengthExceeded`: not even the last turn fits.
    """
    first, starts = _instructions(chat.messages), _starts(chat.messages)
    with model.dispatcher.admit(), Deadline(model, arrived):
        choice = await _least(len(starts), lambda one: _fits(model, _without(chat, first, starts[one])))
    while True:
        try:
            with names.without(first, starts[choice] - first):
                await answer(_without(chat, first, starts[choice]))
            return
        except ContextLengthExceeded:
            # Workers know how long pictures are.
            if client.started or choice == len(starts) - 1:
                raise
            choice += 1


def _instructions(messages: list[ChatMessage]) -> int:
    """How many messages stand before the first turn."""
    return next((i for i, one in enumerate(messages) if one.role not in ("system", "developer")), len(messages))


def _starts(messages: list[ChatMessage]) -> list[int]:
    """Where the conversation may begin. Pictures that a tool gave back belong to the turn that is going on."""
    first = _instructions(messages)
    users = [i for i, one in enumerate(messages) if one.role == "user" and i > first and messages[i - 1].role != "tool"]
    return [first, *users]


def _without(chat: ChatRequest, first: int, start: int) -> ChatRequest:
    return replace(chat, messages=chat.messages[:first] + chat.messages[start:])


async def _fits(model: ServedModel, chat: ChatRequest) -> bool:
    try:
        prompt = await prompt_alone(model, chat)
        model.check_context(len(prompt.token_ids), chat.max_completion_tokens)
    except ContextLengthExceeded:
        return False
    return True


async def _least(choices: int, fits: Callable[[int], Awaitable[bool]]) -> int:
    """The first choice that fits, or the last one; each fits if the one before does."""
    if await fits(0):
        return 0
    low, high = 1, choices - 1
    while low < high:
        middle = (low + high) // 2
        if await fits(middle):
            high = middle
        else:
            low = middle + 1
    return min(low, choices - 1)
