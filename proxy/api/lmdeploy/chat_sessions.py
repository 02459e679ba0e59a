"""What `/v1/chat/completions` has to do with sessions: the fields of LMDeploy's clients.

OpenAI's clients send all of a conversation each time, and nothing is kept of it. A session has a part in a chat where
the body gives its number and a plain string in `messages`; where it is to be ended first; where an answer is to be
stopped.
"""

from __future__ import annotations

from fastapi import Request

from proxy.api.answering import answer_chat
from proxy.api.dialect import Dialect, Head
from proxy.api.http import Client, Exchange
from proxy.api.lmdeploy.session_turns import Asked, Told, answer_turn, drop, session_key, stop_turn
from proxy.api.openai.answer import ChatDialect, Wanted
from proxy.api.openai.sampling import wanted_logprobs
from proxy.api.openai.schema import ChatRequest, PlainTurn
from proxy.models.served_model import ServedModel
from proxy.sessions import Sessions


def session_exchange(
    request: Request, sessions: Sessions, model: ServedModel, body: ChatRequest, arrived: float
) -> Exchange | None:
    """The answer to a chat that a session has a part in; None where none has.

    Args:
        request: which tells the client's host.
        sessions: of all clients.
        model: that `body` means.
        body: of the request.
        arrived: `time.perf_counter()` when it came.
    """
    given = body.instance_id if body.session_id is None else body.session_id
    keeps_session = isinstance(body.messages, PlainTurn) and given is not None
    if not (keeps_session or body.renew_session or body.stop is True):
        return None

    def openai(head: Head, _: Told) -> Dialect:
        has_usage = bool(body.stream_options and body.stream_options.include_usage)
        return ChatDialect(head, Wanted(model.token_texts, has_usage, wanted_logprobs(body)[0]))

    session_id = -1 if given is None else given
    asked = Asked(
        body=body,
        session_id=session_id,
        key=session_key(request, session_id),
        start=True if body.renew_session else None,
        dialect_of=openai,
    )

    async def answer(client: Client) -> None:
        if body.stop is True:
            await stop_turn(client, sessions, model, asked)
        elif keeps_session:
            await answer_turn(client, sessions, model, asked, arrived)
        else:
            await drop(sessions, asked.key, is_named=asked.is_named)
            await answer_chat(client, model, body, arrived)

    return Exchange(answer)
