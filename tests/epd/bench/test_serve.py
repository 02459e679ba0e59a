from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from epd.bench.compare import compare, read_report
from epd.bench.http_client import HttpClient
from epd.bench.load import Pace
from epd.bench.serve import ServeBench, format_report, run_serve
from epd.bench.stream import AnswerReader
from epd.bench.workload import PromptScale, Workload, plan_requests
from epd.cli import main
from epd.errors import ConfigError
from tests.epd.bench.fake_server import Body, FakeServer


def bench(server: FakeServer, **fields: Any) -> ServeBench:
    values: dict[str, Any] = {"pace": Pace(concurrency=3), "num_requests": 7, "workload": Workload(output_tokens=5)}
    return ServeBench(base_url=server.base_url, **(values | fields))


def images(body: Body) -> list[str]:
    content = body["messages"][0]["content"]
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


# -- the client --------------------------------------------------------------------------------------------------------


async def test_closed_loop_keeps_so_many_under_way() -> None:
    async with FakeServer(gather=3) as server:
        report = await run_serve(bench(server))
        assert server.most_running == 3
        assert server.connections <= 4, "connections are reused"
    assert report.model == "fake-model"
    assert (report.total.succeeded, report.total.errors) == (7, {})
    assert report.total.output_tokens == 35
    assert all(len(one.gaps_ms) == 4 and one.ttft_ms is not None for one in report.requests)
    assert "| text |" in format_report(report)


async def test_open_loop_sends_all() -> None:
    async with FakeServer() as server:
        report = await run_serve(bench(server, pace=Pace(rate=1000.0)))
    assert report.total.succeeded == 7
    starts = [one.start_ms for one in report.requests]
    assert starts == sorted(starts)
    assert report.pace == "1000/s"


async def test_prompts_have_the_tokens_asked_for() -> None:
    """This server counts two tokens a word and ten for its template."""
    async with FakeServer() as server:
        report = await run_serve(bench(server, workload=Workload(input_tokens=110, output_tokens=5)))
    assert [one.prompt_tokens for one in report.requests] == [110] * 7


async def test_a_server_that_refuses_fields_gets_none_of_them() -> None:
    lines: list[str] = []
    async with FakeServer(refuses=("ignore_eos", "stream_options")) as server:
        report = await run_serve(bench(server), lines.append)
        assert not any("ignore_eos" in body or "stream_options" in body for body in server.chats)
    assert set(report.refused_fields) == {"ignore_eos", "stream_options"}
    assert len(lines) == 2
    assert report.total.output_tokens == 35, "counted by chunks"


async def test_without_usage_tokens_are_counted_by_chunks() -> None:
    async with FakeServer(usage=False) as server:
        report = await run_serve(bench(server))
    assert report.total.output_tokens == 35
    assert report.requests[0].prompt_tokens is None


async def test_fields_of_the_request() -> None:
    async with FakeServer() as server:
        await run_serve(bench(server, ignore_eos=False, extra_body={"top_k": 5, "temperature": 1}))
        body = server.streams[-1]
    assert "ignore_eos" not in body
    assert (body["top_k"], body["temperature"], body["max_tokens"], body["stream"]) == (5, 1, 5, True)


async def test_a_field_of_the_users_is_never_dropped() -> None:
    async with FakeServer(refuses=("ignore_eos",)) as server:
        with pytest.raises(ConfigError, match="ignore_eos"):
            await run_serve(bench(server, extra_body={"ignore_eos": True}))


async def test_errors_by_kind() -> None:
    failures: list[int | bytes] = [
        503,
        b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n',  # and the connection closes
        b'data: {"error":{"message":"boom"}}\n\n',
        429,
    ]
    late: list[int | bytes] = []

    async with FakeServer(fail=lambda body: late.pop() if late and body["max_tokens"] == 5 else None) as server:
        late.extend(failures)
        report = await run_serve(bench(server, pace=Pace(concurrency=1)))
    assert report.total.errors == {"http 429": 1, "connection": 2, "http 503": 1}
    assert report.total.succeeded == 3


async def test_a_silent_server_times_out() -> None:
    async with FakeServer(gather=1000) as server:
        report = await run_serve(bench(server, timeout_s=0.05))
    assert report.total.errors == {"timeout": 7}


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "no server answers" in capsys.readouterr().err


async def test_a_connection_that_the_server_closed_meanwhile_is_replaced() -> None:
    async with FakeServer() as server:
        client = HttpClient(server.base_url)
        assert await client.request("GET", "/models") == 200
        for connection in list(client._idle):
            connection.is_reusable = True
            assert connection._transport is not None
            connection._transport.close()
        assert await client.request("GET", "/models") == 200
        assert server.connections == 2
        client.close()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="base-url"):
        HttpClient(url)


# -- reading streams ---------------------------------------------------------------------------------------------------


def test_events_may_be_cut_anywhere() -> None:
    stream = (
        b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        b'data: {"choices":[{"delta":{"content":"a"}}]}\r\n\r\n'
        b": a comment\n\n"
        b'data: {"choices":[{"delta":{"content":"b"},"finish_reason":"length"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
        b"data: [DONE]\n\n"
    )
    ticks = iter(range(1000))
    for size in (1, 7, len(stream)):
        reader = AnswerReader(lambda: next(ticks))
        for start in range(0, len(stream), size):
            reader.feed(stream[start : start + size])
        record = reader.record("text", 3.0, status=200)
        assert record.error is None
        assert (record.ttft_ms, record.gaps_ms, record.e2e_ms) == (1000, (1000,), 3000)
        assert (record.prompt_tokens, record.output_tokens, record.start_ms) == (7, 2, 3.0)


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"", "no text"),
        (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', "cut off"),
        (b'data: {"error":{"message":"m"}}\n\n', "error in the stream"),
        (b"data: {\n\n", "malformed event"),
    ],
)
def test_answers_that_are_none(stream: bytes, error: str) -> None:
    reader = AnswerReader()
    reader.feed(stream)
    assert reader.record("text", 0.0, status=200).error == error


# -- workloads ---------------------------------------------------------------------------------------------------------


def plan(count: int = 20, **fields: Any) -> list[Body]:
    workload = Workload(**({"image_size": (64, 32)} | fields))
    planned = plan_requests(workload, count, scale=PromptScale(), fields={"model": "m"})
    return [json.loads(one.body) | {"kind": one.kind} for one in planned]


def test_a_mix_has_its_share_exactly() -> None:
    kinds = [body["kind"] for body in plan(mix="mixed", image_share=0.25)]
    assert kinds.count("image") == 5
    assert kinds != sorted(kinds), "in random order"
    assert {body["kind"] for body in plan(mix="text")} == {"text"}


def test_pictures_have_the_size_and_are_all_different() -> None:
    bodies = plan(mix="image", images_per_request=2)
    urls = [url for body in bodies for url in images(body)]
    assert len(set(urls)) == len(urls) == 40
    picture = Image.open(io.BytesIO(base64.b64decode(urls[0].split(",", 1)[1])))
    assert (picture.size, picture.format) == ((64, 32), "JPEG")


def test_repeats_show_earlier_pictures() -> None:
    shown = [tuple(images(body)) for body in plan(200, mix="image", repeat_share=0.5)]
    assert 0.35 < 1 - len(set(shown)) / 200 < 0.65
    assert len({body["messages"][0]["content"][-1]["text"] for body in plan(200, mix="image")}) == 200


def test_each_seed_is_new_and_the_same_seed_the_same() -> None:
    assert plan(mix="mixed", seed=1) == plan(mix="mixed", seed=1)
    assert not {msgspec.json.encode(body["messages"]) for body in plan(seed=1)} & {
        msgspec.json.encode(body["messages"]) for body in plan(seed=2)
    }


@pytest.mark.parametrize(
    "fields", [{"mix": "video"}, {"image_share": 2}, {"repeat_share": -1}, {"output_tokens": 0}, {"image_size": (0, 5)}]
)
def test_bad_workloads(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields)).replace("_", "-")):
        Workload(**fields)


@pytest.mark.parametrize("fields", [{}, {"concurrency": 0}, {"rate": 0.0}, {"concurrency": 1, "rate": 1.0}])
def test_bad_paces(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Pace(**fields)


# -- the command -------------------------------------------------------------------------------------------------------


async def test_files_and_comparison(tmp_path: Path) -> None:
    async with FakeServer() as server:
        for label, mix in (("b", "mixed"), ("b", "text"), ("a", "text")):
            workload = Workload(mix=mix, image_size=(32, 32), output_tokens=3)
            report = await run_serve(bench(server, label=label, workload=workload))
            (tmp_path / f"{label}-{mix}.json").write_bytes(msgspec.json.encode(report))
    reports = [read_report(tmp_path / name) for name in ("b-mixed.json", "b-text.json", "a-text.json")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compare(reports, by_kind=True).splitlines()]
    assert rows[0][:4] == ["server", "load", "conc.", "ok/err"]
    assert [row[:4] for row in rows[2:]] == [
        ["b", "text", "3", "7/0"],
        ["b", "mixed", "3", "7/0"],
        ["b", "– text", "3", "3/0"],
        ["b", "– image", "3", "4/0"],
        ["a", "text", "3", "7/0"],
    ]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"other\.json"):
        read_report(tmp_path / "other.json")


async def test_plot_is_a_picture(tmp_path: Path) -> None:
    from epd.bench.plot import plot_report

    async with FakeServer() as server:
        report = await run_serve(bench(server, workload=Workload(mix="mixed", image_size=(32, 32), output_tokens=3)))
    plot_report(report, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    "flags", [["--image-size", "large"], ["--extra-body", "[]"], ["--extra-body", "{"], ["--num-requests", "0"]]
)
def test_bad_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
