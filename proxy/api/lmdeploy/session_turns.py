"""One turn of a conversation that the server keeps, whichever endpoint it comes by.

    sequence_start   sequence_end   the turn
    true             true           alone: nothing is kept; what the session had is dropped
    true             false          begins the session anew
    false            …              goes on with it; 400 where there is none
    not said         …              goes on with it where there is one

What does not fit into the context is answered with nothing and `length`, and the session stays as it is, until it is
ended or renewed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import msgspec
from fastapi import Request
from msgspec import UNSET

from epd.errors import ContextLengthExceeded, InvalidRequest, SessionBusy, SessionsUnavailable
from epd.types import FinishReason, SamplingParams
from metastore.sessions import SessionKey
from proxy.api.answering import tell, with_grammar, work_of
from proxy.api.dialect import Dialect, Head, News
from proxy.api.http import Client
from proxy.api.openai.objects import PromptTokensDetails, Usage
from proxy.api.openai.prompt import count_parts, messages_of
from proxy.api.openai.sampling import check_supported, sampling_of, text_options_of
from proxy.api.openai.schema import ChatRequest
from proxy.api.requests import Deadline
from proxy.dispatch.generation import Generation
from proxy.dispatch.work import Work
from proxy.media.loader import ImageSource
from proxy.models.served_model import ServedModel
from proxy.request_context import KEY_ID
from proxy.sessions import Conversation, Sessions, Turn
from proxy.text.answer import Answer, TextOptions
from proxy.text.user_text import Message

log = logging.getLogger(__name__)

NOTE_HEADER = "x-session-note"
"""What the client may not expect of its session."""
_WHOLE_CONVERSATIONS_ONLY = (
    *("tools", "functions", "continue_final_message", "chat_template_kwargs", "add_special_tokens", "echo"),
    *("truncate_prompt_tokens", "return_tokens_as_token_ids"),
)
"""Fields of chats that are about a prompt as a whole, or that nobody has asked sessions for."""
_DROPPED = "the session had a history, which was dropped"


@dataclass(frozen=True, kw_only=True)
class Told:
    """What answers say of their turn."""

    session_id: int
    input_tokens: int = 0
    """New ones, before the answer."""
    history_tokens: int = 0
    """The session's, before this turn."""
    exceeded: bool = False
    """There was no room for the turn."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A turn."""

    body: ChatRequest
    """The new messages, and how to sample."""
    session_id: int
    """-1: the client did not give one."""
    key: SessionKey
    start: bool | None = None
    """Begin anew; False: there must be a session; None: as it comes."""
    end: bool = False
    """The session is over with this answer."""
    dialect_of: Callable[[Head, Told], Dialect]

    @property
    def is_named(self) -> bool:
        """Whether the client gave the session's number. Who did not may not know that there are sessions."""
        return self.session_id >= 0

    @property
    def is_alone(self) -> bool:
        """Whether no session has a part in it."""
        return self.end and (bool(self.start) or (self.start is None and not self.is_named))


def session_key(request: Request, session_id: int) -> SessionKey:
    """Whose session, and which. Without a number it is that of the client's host at this listener."""
    owner = KEY_ID.get() or "anonymous"
    if session_id >= 0:
        return SessionKey(owner, str(session_id))
    host = request.client.host if request.client is not None else ""
    listener, port = request.scope.get("server") or ("", None)
    return SessionKey(owner, f"-1@{host}@{listener}:{port}")


async def answer_turn(client: Client, sessions: Sessions, model: ServedModel, asked: Asked, arrived: float) -> None:
    """Answer one turn. The session has it before the client hears of the end.

    Raises:
        EPDError: nothing was told; the session is what it was.
    """
    body = asked.body
    _check(body)
    options, sampling = text_options_of(body, model), sampling_of(body, model)
    model.check_context(count_parts(body), None)
    messages, sources = messages_of(body)
    _check_pictures(sources, model, asked)
    model.require(images=bool(sources))
    head = Head.new("chatcmpl", model.name, model.ref.fingerprint)
    with model.dispatcher.admit():
        async with AsyncExitStack() as stack:
            with Deadline(model, arrived):
                turn = await _take(stack, client, sessions, asked, head.id)
                plan = await _plan(client, model, asked, turn, messages)
                sampling = await with_grammar(model, body, sampling)
                images = await model.load_images(sources)
            sampling = _within_context(model, sampling, len(plan.token_ids))
            work = work_of(model, body, head, arrived, sampling, [plan.token_ids], plan.image_offsets, images)
            dialect = asked.dialect_of(head, plan.told)
            if not plan.told.exceeded:
                if await _tell_answer(client, sessions, model, asked, turn, plan, work, dialect, options):
                    return
                dialect = asked.dialect_of(head, replace(plan.told, exceeded=True))
            if asked.end:
                await sessions.commit(turn, None)
            await _tell_nothing(client, model, dialect, FinishReason.LENGTH, stream=bool(body.stream))


async def stop_turn(client: Client, sessions: Sessions, model: ServedModel, asked: Asked) -> None:
    """Stop the answer that a session is getting, and tell nothing. What was said so far is kept.

    Raises:
        SessionsUnavailable: there is no telling whether there is one.
    """
    await sessions.stop(asked.key)
    dialect = asked.dialect_of(
        Head.new("chatcmpl", model.name, model.ref.fingerprint), Told(session_id=asked.session_id)
    )
    await _tell_nothing(client, model, dialect, FinishReason.STOP, stream=bool(asked.body.stream))


async def drop(sessions: Sessions, key: SessionKey, *, is_named: bool) -> bool:
    """End a session, if there is one. Returns whether there was.

    Raises:
        SessionBusy, SessionsUnavailable: it can't be ended now. Not where the client gave no number.
    """
    try:
        return await sessions.forget(key)
    except (SessionBusy, SessionsUnavailable):
        if is_named:
            raise
        return False


def _check(body: ChatRequest) -> None:
    check_supported(body)
    if (body.n or 1) > 1:
        raise InvalidRequest("n: a session goes on with one answer; ask for one.", param="n")
    used = {field: bool(getattr(body, field)) for field in _WHOLE_CONVERSATIONS_ONLY}
    used["add_generation_prompt"] = body.add_generation_prompt is False
    used["prompt_logprobs"] = body.prompt_logprobs is not None
    used["stream_options.continuous_usage_stats"] = bool(
        body.stream_options and body.stream_options.continuous_usage_stats
    )
    for field in (field for field, is_used in used.items() if is_used):
        raise InvalidRequest(f"{field} has no place in a session; leave out session_id or {field}.", param=field)


def _check_pictures(sources: Sequence[ImageSource], model: ServedModel, asked: Asked) -> None:
    if not sources:
        return
    param = sources[0].param
    if model.image_token_id is None:
        raise InvalidRequest("This model reads text only; remove the images.", param=param)
    if not asked.is_alone:
        # A session keeps tokens; for pictures it would have to keep their bytes.
        raise InvalidRequest(
            "Sessions hold text only. Send pictures without a session, or the whole conversation to "
            "/v1/chat/completions.",
            param=param,
        )


async def _take(stack: AsyncExitStack, client: Client, sessions: Sessions, asked: Asked, request_id: str) -> Turn:
    if not asked.is_alone:
        try:
            return await stack.enter_async_context(sessions.turn(asked.key, request_id))
        except (SessionBusy, SessionsUnavailable) as error:
            if asked.is_named or not asked.start:
                raise
            # Who asks without a number asks for an answer first of all.
            client.headers[NOTE_HEADER] = "this turn is not kept"
            log.info("a turn without a session's number is not kept: %s", error.message)
    elif await drop(sessions, asked.key, is_named=asked.is_named):
        client.headers[NOTE_HEADER] = _DROPPED
    return await stack.enter_async_context(sessions.alone(asked.key, request_id))


@dataclass(frozen=True)
class _Plan:
    """What a turn asks of the model."""

    token_ids: tuple[int, ...]
    image_offsets: tuple[int, ...]
    told: Told


async def _plan(client: Client, model: ServedModel, asked: Asked, turn: Turn, messages: list[Message]) -> _Plan:
    history = _history(client, model, asked, turn)
    offsets: tuple[int, ...] = ()
    told = Told(session_id=asked.session_id, history_tokens=len(history))
    try:
        if history:
            added = await model.encode_next(messages)
        else:
            prompt = await model.encode_chat(messages, {})
            added, offsets = prompt.token_ids, prompt.image_offsets
        told = replace(told, input_tokens=len(added))
        model.check_context(len(history) + len(added), None)
    except ContextLengthExceeded:
        return _Plan(history, (), replace(told, exceeded=True))
    return _Plan(history + added, offsets, told)


async def _tell_answer(
    client: Client,
    sessions: Sessions,
    model: ServedModel,
    asked: Asked,
    turn: Turn,
    plan: _Plan,
    work: Work,
    dialect: Dialect,
    options: TextOptions,
) -> bool:
    """Have the turn answered, and kept. Returns False, with nothing told, when it is too long after all: pictures have
    more tokens than their placeholders."""

    async def keep(generation: Generation, answers: Sequence[Answer]) -> None:
        said = plan.token_ids + _said(generation, answers[0])
        await sessions.commit(turn, None if asked.end else Conversation(model.ref.fingerprint, said))

    try:
        await tell(
            client,
            model,
            work,
            dialect,
            options,
            stream=bool(asked.body.stream),
            with_timings=bool(asked.body.timings),
            at_end=keep,
        )
    except ContextLengthExceeded:
        if client.started:
            raise
        return False
    return True


def _history(client: Client, model: ServedModel, asked: Asked, turn: Turn) -> tuple[int, ...]:
    """Tokens that the turn goes on with; none where it begins the session."""
    before = turn.before
    if asked.start:
        if before is not None:
            client.headers[NOTE_HEADER] = _DROPPED
        return ()
    if before is not None and before.model == model.ref.fingerprint:
        return before.token_ids
    if asked.start is False:
        problem = "does not exist" if before is None else "was begun with another model"
        raise InvalidRequest(f"Session {asked.session_id} {problem}; send sequence_start=true", param="sequence_start")
    return ()


def _within_context(model: ServedModel, sampling: SamplingParams, prompt_tokens: int) -> SamplingParams:
    """The answer is cut at the end of the context, which workers know when pictures are in it: they have more tokens
    than their placeholders. Where the model can't end the answer, it is exactly so long."""
    sampling = msgspec.structs.replace(sampling, fits_context=True)
    most, limit = sampling.max_tokens, model.max_model_len
    if limit:
        left = max(limit - prompt_tokens, 1)
        most = left if most is None else min(most, left)
    if sampling.ignore_eos and most is not None:
        return msgspec.structs.replace(sampling, max_tokens=most, min_tokens=most, ignore_eos=False)
    return msgspec.structs.replace(sampling, max_tokens=most)


def _said(generation: Generation, answer: Answer) -> tuple[int, ...]:
    """The answer's tokens, without the one that ended it: the next turn begins with what the template puts there."""
    token_ids = generation.token_ids(0)[: answer.completion_tokens]
    if answer.ended_by is not None and token_ids[-1:] == (answer.ended_by,):
        return token_ids[:-1]
    return token_ids


async def _tell_nothing(
    client: Client, model: ServedModel, dialect: Dialect, reason: FinishReason, *, stream: bool
) -> None:
    """Tell an answer without text."""
    answer = Answer(model.tokenizer, TextOptions())
    answer.finish_reason = reason
    usage = Usage(0, 0, 0, PromptTokensDetails())
    if not stream:
        await client.reply(dialect.whole([answer], usage, UNSET))
        return
    await client.start_stream(dialect.headers)
    await client.end_stream(dialect.opening(0) + dialect.closing(0, answer, News(), UNSET) + dialect.end(usage))
