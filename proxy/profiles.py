"""Has one worker record what it computes, and waits for its answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

from epd.errors import WorkerFailed
from epd.messages import AnyMessage, Profile, ProfileReply

ANSWER_TIMEOUT_S = 60.0
"""Writing a trace takes seconds; a worker of an older version never answers."""


class Profiles:
    """Of one worker.

    Args:
        send: to the worker; raises WorkerFailed when it is gone.
    """

    def __init__(self, send: Callable[[AnyMessage], Awaitable[None]]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[ProfileReply]] = {}

    async def start(self, seconds: float, steps: int, timeout_s: float = ANSWER_TIMEOUT_S) -> ProfileReply:
        """Begin to record, for so long or for so many steps. What goes wrong is the reply's state `failed`."""
        return await self._ask(
            Profile(sequence=next(self._numbers), start=True, seconds=seconds, steps=steps), timeout_s
        )

    async def stop(self, timeout_s: float = ANSWER_TIMEOUT_S) -> ProfileReply:
        """End it, and have the trace written. What goes wrong is the reply's state `failed`."""
        return await self._ask(Profile(sequence=next(self._numbers), start=False), timeout_s)

    def answered(self, reply: ProfileReply) -> None:
        """The worker answers."""
        waiting = self._waiting.pop(reply.sequence, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def lost(self, reason: str) -> None:
        """The worker is gone."""
        for number in list(self._waiting):
            self.answered(ProfileReply(sequence=number, state="failed", message=reason[:500]))

    async def _ask(self, message: Profile, timeout_s: float) -> ProfileReply:
        reply: asyncio.Future[ProfileReply] = asyncio.get_running_loop().create_future()
        self._waiting[message.sequence] = reply
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(message)
                return await reply
        except TimeoutError:
            reason = f"no answer within {timeout_s:g} s; is it of this version?"
        except WorkerFailed as error:
            reason = error.message
        finally:
            self._waiting.pop(message.sequence, None)
        return ProfileReply(sequence=message.sequence, state="failed", message=reason[:500])
