"""The soak must see what it looks for."""

from __future__ import annotations

import random

import pytest

from epd.bench import soak
from epd.bench.http_client import HttpClient
from epd.bench.soak import SoakBench, SoakResult, format_soak, soak_and_print
from epd.bench.soak_requests import Sample, SoakRequest, ask, check_pool, make_pool
from epd.errors import ConfigError
from tests.epd.bench.fake_server import FakeServer

REQUEST = SoakRequest("text", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6})


async def _check(server: FakeServer, expected: tuple[Sample, ...], *, stream: bool) -> SoakResult:
    client = HttpClient(server.base_url)
    result = SoakResult()
    await soak._ask_and_check(client, REQUEST, expected, stream, None, result)
    client.close()
    return result


@pytest.mark.parametrize("stream", [False, True])
async def test_right_and_wrong_answers_are_told_apart(stream: bool) -> None:
    async with FakeServer() as server:
        right = await _check(server, (Sample("xxxxxx", (), "length"),), stream=stream)
        assert (right.right, right.violations) == (1, [])
        for wrong in (Sample("xxxxx", (), "length"), Sample("xxxxxx", (1,), "length"), Sample("xxxxxx", (), "stop")):
            result = await _check(server, (wrong,), stream=stream)
            assert (result.right, len(result.violations)) == (0, 1)
            assert "another answer" in result.violations[0]


@pytest.mark.parametrize("failure", [503, b'data: {"choices":[]}\n\n', b"nonsense"])
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_are_violations(failure: int | bytes, stream: bool) -> None:
    async with FakeServer(fail=lambda _: failure) as server:
        result = await _check(server, (), stream=stream)
    assert (result.right, len(result.violations)) == (0, 1)
    assert result.violations[0].startswith("failed")


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_closes_the_connection(stream: bool) -> None:
    async with FakeServer(gather=1000) as server:
        client = HttpClient(server.base_url)
        leave_after = 1 if not stream else 0
        assert await ask(client, REQUEST, stream=stream, leave_after=leave_after) is None
        assert client._idle == []
        client.close()


def test_growth_is_a_violation() -> None:
    mib = 1 << 20
    result = SoakResult(memory={"steady": (400 * mib, 430 * mib), "leaky": (400 * mib, 600 * mib)})
    soak._check_memory(result)
    assert result.violations == ["leaky grew from 400 to 600 MiB"]


def test_violations_decide_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = SoakResult(right=3)

    async def run(_: SoakBench) -> SoakResult:
        return result

    monkeypatch.setattr(soak, "run_soak", run)
    assert soak_and_print(SoakBench()) == 0
    result.violations += ["a process died and was started again"]
    assert soak_and_print(SoakBench()) == 1
    assert "a process died" in capsys.readouterr().out


def test_many_violations_of_a_kind_are_counted() -> None:
    text = format_soak(SoakResult(violations=[f"another answer than alone ({i})" for i in range(9)]))
    assert "9 VIOLATIONS" in text
    assert "6 more of this kind" in text


def test_a_pool_of_equal_answers_is_refused() -> None:
    same, other = (Sample("a", (1,), "stop"),), (Sample("b", (2,), "stop"),)
    check_pool([same, other])
    with pytest.raises(ConfigError, match="differ"):
        check_pool([same, same, same])


def test_pool_has_all_kinds_and_is_the_same_for_a_seed() -> None:
    pool = make_pool("m", 14, random.Random(1), max_tokens=32)
    assert {request.kind for request in pool} == {"text", "image", "two images", "text, n=2", "image, n=2"}
    assert pool == make_pool("m", 14, random.Random(1), max_tokens=32)
    assert len({request.body(stream=True) for request in pool}) == 14
