from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from epd.bench import report
from epd.bench.load import Pace
from epd.bench.machine import describe_machine
from epd.bench.report import Notify, ReportBench, run_report
from epd.bench.serve import ServeBench, ServeReport, run_serve
from epd.bench.workload import Workload
from epd.errors import ConfigError
from tests.epd.bench.fake_server import FakeServer


async def load_report(label: str, fail: int | None = None) -> ServeReport:
    workload = Workload(output_tokens=5)
    async with FakeServer(fail=lambda body: fail if body["max_tokens"] == 5 else None) as server:
        return await run_serve(
            ServeBench(
                base_url=server.base_url, pace=Pace(concurrency=2), num_requests=4, workload=workload, label=label
            )
        )


class Fakes:
    """In place of the measurements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0, fail: int | None = None) -> None:
        self.commands: list[tuple[str, ...]] = []
        self._code = code
        self._fail = fail
        monkeypatch.setattr(report, "_run_command", self._run_command)
        monkeypatch.setattr(report, "_serve_all", self._serve_all)

    async def _run_command(self, arguments: Sequence[str], notify: Notify) -> tuple[int, str]:
        self.commands.append(tuple(arguments))
        return (self._code if arguments[0] == "soak" else 0), f"output of {arguments[0]}\n"

    async def _serve_all(self, bench: ReportBench, model: Path, notify: Notify) -> list[ServeReport]:
        return [await load_report("epd", self._fail)]


async def test_each_part_stands_under_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes(monkeypatch)
    peer = tmp_path / "peer.json"
    peer.write_bytes(msgspec.json.encode(await load_report("another server")))
    bench = ReportBench(out=tmp_path / "B.md", peers=(peer,), engine={"block_size": 32}, settle_s=2)
    assert await run_report(bench) == 0
    assert [arguments[0] for arguments in fakes.commands] == ["checkpoint", "engine", "transfer", "proxy", "soak"]
    text = (tmp_path / "B.md").read_text()
    for name in ("engine", "transfer", "proxy", "soak"):
        assert text.index(f"epd bench {name}") < text.index(f"output of {name}")
    assert "epd bench engine --model DIR --dtype bfloat16 --settle 2 --engine '{\"block_size\": 32}'" in text
    assert "| epd " in text
    assert "| another server |" in text
    assert "4/0" in text


async def test_the_file_names_no_host_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch)
    await run_report(ReportBench(out=tmp_path / "B.md", model=tmp_path / "checkpoint"))
    text = (tmp_path / "B.md").read_text()
    assert str(tmp_path) not in text
    assert platform.node() not in text


@pytest.mark.parametrize(("code", "fail"), [(1, None), (0, 503)])
async def test_violations_and_failed_requests_show_in_the_exit_code(
    code: int, fail: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fakes(monkeypatch, code, fail)
    assert await run_report(ReportBench(out=tmp_path / "B.md")) == 1
    assert (tmp_path / "B.md").is_file()


async def test_a_part_that_cannot_run_ends_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fakes(monkeypatch, code=2)
    with pytest.raises(ConfigError, match="epd bench soak"):
        await run_report(ReportBench(out=tmp_path / "B.md"))
    assert not (tmp_path / "B.md").exists()


async def test_folders_are_made_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes(monkeypatch)
    out, json_dir = tmp_path / "new" / "B.md", tmp_path / "json" / "of loads"
    await run_report(ReportBench(out=out, json_dir=json_dir))
    assert out.is_file()
    assert json_dir.is_dir()
    (tmp_path / "file").touch()
    fakes.commands.clear()
    with pytest.raises(ConfigError, match="--json-dir"):
        await run_report(ReportBench(out=out, json_dir=tmp_path / "file"))
    assert not fakes.commands


def test_the_machine_is_described() -> None:
    described = dict(describe_machine())
    assert described["Python"] == platform.python_version()
    assert described["torch"].startswith("2.")
    assert all(described.values())
