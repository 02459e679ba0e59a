"""Compiles grammars on a thread of their own, one after the other: neither steps nor the event loop wait for it."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from epd.errors import EPDError, InternalError, Overloaded
from epd.types import Grammar
from workers.engine.grammar import GrammarCompiler

log = logging.getLogger(__name__)


@dataclass
class _Job:
    grammar: Grammar
    is_wanted: bool = True
    """Whether somebody still waits for it."""


class GrammarThread:
    """Used on one event loop.

    Args:
        grammars: keeps what was compiled.
        max_waiting: grammars in the queue, those included that nobody waits for any more; more are refused.
    """

    def __init__(self, grammars: GrammarCompiler, max_waiting: int) -> None:
        self._grammars = grammars
        self._max_waiting = max_waiting
        self._waiting = 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    async def compile(self, grammar: Grammar) -> None:
        """Return when the grammar is compiled. May be cancelled.

        Raises:
            InvalidRequest: the grammar can't be followed.
            Overloaded: too many wait.
            InternalError: the compiler failed.
        """
        if self._waiting >= self._max_waiting:
            raise Overloaded(f"{self._waiting} grammars wait to be compiled.")
        job = _Job(grammar)
        self._waiting += 1
        compiled = asyncio.get_running_loop().run_in_executor(self._pool, self._compile, job)
        compiled.add_done_callback(self._ended)
        try:
            # Cancelling it would leave it in the queue, and tell us that it has gone.
            await asyncio.shield(compiled)
        except asyncio.CancelledError:
            job.is_wanted = False
            raise
        except EPDError:
            raise
        except Exception as error:  # the edge of a library that reads what strangers wrote
            log.exception("a grammar of %d characters can't be compiled", len(grammar.text))
            raise InternalError("The grammar can't be compiled.") from error

    def stop(self) -> None:
        """Drop what waits. What is being compiled ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, job: _Job) -> None:
        if job.is_wanted:
            self._grammars.compile(job.grammar)

    def _ended(self, compiled: asyncio.Future[None]) -> None:
        self._waiting -= 1
        if not compiled.cancelled():
            compiled.exception()  # perhaps nobody waits for it any more
