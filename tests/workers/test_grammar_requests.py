"""Requests with a grammar on their way to the engine: compiled on another thread, which fails, hangs or takes long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import cast

import pytest

from epd.errors import InvalidRequest
from epd.messages import Abort, GenerateRequest
from epd.types import FinishReason, Grammar, GrammarKind, SamplingParams
from tests.workers.engine.fakes import FakeRunner, fake_engine
from tests.workers.test_prefill_decode import MAX_REQUESTS, PROXY, Sent
from workers.engine.grammar import GrammarCompiler, GrammarMatcher
from workers.prefill_decode import PrefillDecodeService

LETTERS = Grammar(GrammarKind.REGEX, "a*")


class AnyText:
    """A matcher that is never done."""

    is_accepting = True
    is_complete = False
    error = None

    def accept(self, token: int) -> None:
        pass


class FakeGrammars:
    """Compiles when the test lets it."""

    def __init__(self) -> None:
        self.may_compile = threading.Event()
        self.may_compile.set()
        self.threads: set[str] = set()
        self.failure: Exception | None = None
        self.compiled: list[Grammar] = []

    def compile(self, grammar: Grammar) -> None:
        self.threads.add(threading.current_thread().name)
        self.compiled.append(grammar)
        assert self.may_compile.wait(20)
        if self.failure is not None:
            raise self.failure

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        return cast("GrammarMatcher", AnyText())


class Setup:
    def __init__(self) -> None:
        self.grammars = FakeGrammars()
        self.peers = Sent()
        self.engine = fake_engine(FakeRunner())
        self.engine.grammars = cast("GrammarCompiler", self.grammars)
        self.service = PrefillDecodeService(
            self.engine, self.peers.send, max_requests=MAX_REQUESTS, crashed=asyncio.Event()
        )

    def generate(self, request_id: str, grammar: Grammar | None = LETTERS) -> None:
        message = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=(1, 2, 3),
            sampling=SamplingParams(max_tokens=3, temperature=0, grammar=grammar),
            timeout_s=60,
        )
        self.service.handle(PROXY, message, [])


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup()
    yield made
    made.grammars.may_compile.set()
    await made.service.stop()
    made.engine.check_integrity()


async def test_it_is_compiled_neither_on_the_loop_nor_on_the_engines_thread(setup: Setup) -> None:
    setup.generate("r")
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.LENGTH
    assert setup.peers.tokens_of("r") == [3, 4, 5]
    (name,) = setup.grammars.threads
    assert name.startswith("grammar")


async def test_others_are_answered_while_a_grammar_is_compiled(setup: Setup) -> None:
    setup.grammars.may_compile.clear()
    setup.generate("slow")
    setup.generate("quick", grammar=None)
    await setup.peers.end_of("quick")
    assert setup.peers.tokens_of("slow") == []
    setup.grammars.may_compile.set()
    await setup.peers.end_of("slow")


@pytest.mark.parametrize(
    ("failure", "code"), [(InvalidRequest("no such rule"), "invalid_request"), (RuntimeError("a"), "internal_error")]
)
async def test_one_that_can_not_be_compiled_ends_its_request(setup: Setup, failure: Exception, code: str) -> None:
    setup.grammars.failure = failure
    setup.generate("r")
    end = await setup.peers.end_of("r")
    assert end.error is not None
    assert end.error.code == code
    await asyncio.wait_for(setup.service.drain(), 20)


async def test_an_abort_reaches_a_request_whose_grammar_is_being_compiled(setup: Setup) -> None:
    setup.grammars.may_compile.clear()
    setup.generate("r")
    setup.service.handle(PROXY, Abort(request_ids=("r",)), [])
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.ABORT
    setup.grammars.may_compile.set()
    setup.generate("next")  # compiled behind it
    await setup.peers.end_of("next")
    assert setup.peers.tokens_of("r") == []


async def test_a_proxy_that_goes_leaves_nothing_to_do(setup: Setup) -> None:
    setup.grammars.may_compile.clear()
    setup.generate("r")
    setup.service.peer_gone(PROXY)
    await asyncio.wait_for(setup.service.drain(), 20)
    assert setup.peers.outputs == {}


async def test_stopping_answers_what_is_being_compiled(setup: Setup) -> None:
    setup.grammars.may_compile.clear()
    setup.generate("r")
    await setup.service.stop()
    error = (await setup.peers.end_of("r")).error
    assert error is not None
    assert error.code == "handed_over"


async def test_grammars_that_nobody_waits_for_any_more_are_bounded_and_never_compiled(setup: Setup) -> None:
    setup.grammars.may_compile.clear()
    setup.generate("first")
    letters = [Grammar(GrammarKind.REGEX, f"a{number}") for number in range(MAX_REQUESTS)]
    for number, grammar in enumerate(letters):
        setup.generate(f"r{number}", grammar)
        await asyncio.sleep(0)  # it is in the queue
        setup.service.handle(PROXY, Abort(request_ids=(f"r{number}",)), [])
    setup.generate("one more")
    error = (await setup.peers.end_of("one more")).error
    assert error is not None
    assert error.code == "overloaded"
    setup.grammars.may_compile.set()
    assert (await setup.peers.end_of("first")).finish_reason is FinishReason.LENGTH
    setup.generate("later")
    assert (await setup.peers.end_of("later")).finish_reason is FinishReason.LENGTH
    assert setup.grammars.compiled == [LETTERS, LETTERS]
