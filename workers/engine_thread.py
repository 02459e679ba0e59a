"""The engine on a thread of its own, and the two queues that cross to it.

The event loop puts commands in; the thread takes all that are there, runs one step, and posts everything that the
step made in one call back to the loop. So a busy engine costs the loop one wake-up a step, and a busy loop costs the
engine nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Sequence

from epd.errors import EPDError, ErrorInfo, InternalError, NoWorker, Overloaded
from workers.core_turns import CoreTurns
from workers.engine.engine import Engine
from workers.engine.outputs import StepOutput
from workers.stall_watch import Progress

log = logging.getLogger(__name__)

_CHECK_AFTER_IDLE_S = 0.5
"""An engine that has been idle for so long recounts its blocks, once, before it sleeps on."""

_LONGEST_STEP_S = 10.0
"""A thread that is stuck for so long is left behind at the end."""

MAX_UNANSWERED = 8192
"""Commands that the engine has not come to, while it is in a step; more are refused as overloaded."""

Command = Callable[[Engine], None]
Reply = Callable[[ErrorInfo | None], None]


class EngineThread:
    """Owns the engine: nobody else may touch it once the thread runs.

    Args:
        engine: as built, on the calling thread.
        deliver: called on the event loop, once a step.
        crashed: called on the event loop when the engine can't go on. No request is answered after that.
        turns: each step takes one.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[Sequence[StepOutput]], None],
        crashed: Callable[[], None],
        turns: CoreTurns,
    ) -> None:
        self.load = engine.load()
        """As of the last step. Read by the event loop, replaced by the thread."""
        self.integrity_checks = 0
        """Recounts of all resources, each after the last request had gone."""
        self.integrity_failures = 0
        self.is_busy = False
        """There is something to compute or to do. Written by the thread, as `steps`."""
        self.steps = 0
        """That have ended."""
        self._is_unchecked = False
        self._unanswered: dict[int, Reply] = {}
        self._numbers = itertools.count()
        self._end_error: ErrorInfo | None = None
        """Set when the thread has ended: why it takes no commands any more."""
        self._engine = engine
        self._deliver = deliver
        self._crashed = crashed
        self._turns = turns
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Have `command` called on the engine's thread before its next step. What it raises ends the engine.

        Not bounded here: for the caller's own commands, and at most one for each request that it has accepted.
        """
        self._commands.put(command)

    def ask(self, command: Command, reply: Reply) -> None:
        """As `submit`; then call `reply` on the event loop, with the error if the command raised an `EPDError`.

        `reply` is called exactly once, also when the thread ends before the command is run, or has ended already.
        """
        if self._end_error is not None:
            reply(self._end_error)
            return
        if len(self._unanswered) >= MAX_UNANSWERED:
            reply(Overloaded(f"{MAX_UNANSWERED} requests and pictures wait for the engine to look at them.").to_info())
            return
        number = next(self._numbers)
        self._unanswered[number] = reply

        def run(engine: Engine) -> None:
            error = None
            try:
                command(engine)
            except EPDError as raised:
                error = raised.to_info()
            self._loop.call_soon_threadsafe(self._reply, number, error)

        self._commands.put(run)

    def progress(self) -> Progress:
        """Whether it moves."""
        largest_step_s = self.load.largest_step_ms / 1000
        return Progress(self.is_busy, self.steps, largest_step_s, self._engine.is_disturbed())

    async def stop(self) -> None:
        """End the thread after the step that it is in, and answer what was asked of it."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, _LONGEST_STEP_S)
        if self._thread.is_alive():
            log.warning("left the engine in a step that takes more than %g s", _LONGEST_STEP_S)
        self._end(NoWorker("The prefill-decode worker is shutting down."))

    def _reply(self, number: int, error: ErrorInfo | None) -> None:
        reply = self._unanswered.pop(number, None)
        if reply is not None:
            reply(error)

    def _end(self, error: EPDError) -> None:
        self._end_error = error.to_info()
        for number in list(self._unanswered):
            self._reply(number, self._end_error)

    def _on_crash(self) -> None:
        self._end(InternalError("The prefill-decode worker has failed."))
        self._crashed()

    def _run(self) -> None:
        try:
            while self._take_commands():
                with self._turns:
                    outputs = self._engine.step()
                self.steps += 1
                self.load = self._engine.load()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
        except Exception:
            # The edge of the thread: whatever it was, the requests must be answered and the process must end.
            log.exception("the engine can't go on")
            self._loop.call_soon_threadsafe(self._on_crash)

    def _take_commands(self) -> bool:
        """Run the commands that are there, waiting for one when there is nothing to compute. False: stop."""
        try:
            command = self._next_command()
            self.is_busy = True
            while command is not None:
                self._is_unchecked = True
                command(self._engine)
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _next_command(self) -> Command | None:
        """The next command; waits while the engine has nothing to do. Raises queue.Empty when it has again."""
        self.is_busy = self._engine.has_work()
        if self.is_busy:
            return self._commands.get_nowait()
        wait_s = self._engine.seconds_to_deadline()
        if not self._is_unchecked or (wait_s is not None and wait_s < _CHECK_AFTER_IDLE_S):
            return self._commands.get(timeout=wait_s if wait_s is None else max(wait_s, 0))
        try:
            return self._commands.get(timeout=_CHECK_AFTER_IDLE_S)
        except queue.Empty:
            self._check_integrity()
            raise

    def _check_integrity(self) -> None:
        self._is_unchecked = False
        self.integrity_checks += 1
        try:
            self._engine.check_integrity()
        except AssertionError:
            self.integrity_failures += 1
            log.exception("the engine's resources do not add up")
