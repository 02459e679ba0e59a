from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import uvloop

from epd.bench.process_usage import cpu_s, resident_bytes
from epd.bench.proxy import ProxyBench, ProxyFigures, RequestFigures, Side, format_proxy_figures, run_proxy_bench
from epd.bench.proxy_streams import BodyFigures, StreamFigures
from epd.bench.transfer import TransferFigures, format_transfer_figures, run_transfer_bench
from epd.cli import main
from epd.errors import ConfigError


def cells(table: str, row: int) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[row].split("|")[1:-1]]


async def test_transfer_over_both_sockets() -> None:
    figures = await run_transfer_bench([4096, 1 << 20])
    assert [(one.transport, one.size_bytes) for one in figures] == [
        ("IPC", 4096),
        ("IPC", 1 << 20),
        ("TCP", 4096),
        ("TCP", 1 << 20),
    ]
    for one in figures:
        assert min(one.alone_ms, one.alone_gb_s, one.pipelined_gb_s, one.memcpy_gb_s) > 0
        assert one.alone_gb_s == pytest.approx(one.size_bytes / one.alone_ms / 1e6)


async def test_sizes_are_whole_rows() -> None:
    with pytest.raises(ConfigError, match="5000"):
        await run_transfer_bench([5000])


def test_the_commands_print_their_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "transfer", "--sizes", "4,64"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert main(["bench", "transfer", "--sizes", "much"]) == 2
    assert main(["bench", "proxy", "--requests", "0"]) == 2


def test_proxy_against_the_bare_server() -> None:
    """On uvloop, as the command runs it: its transports are not asyncio's."""
    bench = ProxyBench(requests=8, concurrency=4, output_tokens=5, rounds=2, streams=3, seconds=1, body_mib=1)
    figures = uvloop.run(run_proxy_bench(bench))
    assert [one.tokens for one in figures.requests] == [1, 5]
    for one in figures.requests:
        assert one.requests == len(one.front.alone_ms) == len(one.bare.alone_ms) == 8
        assert min(*one.front.alone_ms, *one.bare.alone_ms, one.front.busy_s, one.bare.busy_s) > 0
        assert min(one.front.cpu_s, one.bare.cpu_s, one.front.worker_cpu_s) > 0
    assert [(one.streams, one.tokens) for one in figures.streams] == [(3, 3 * 200), (3, 3 * 20)]
    for stream in figures.streams:
        assert 3 <= stream.events <= stream.tokens
        assert stream.duration_s >= 0.9  # the worker keeps its pace
    assert figures.body.mib == pytest.approx(1.0, rel=0.1)
    assert min(figures.body.answer_ms, figures.body.gap_ms, figures.body.quiet_gap_ms) > 0
    assert "| streamed " in format_proxy_figures(figures)


async def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        await run_proxy_bench(ProxyBench(model=tmp_path))


def test_tables() -> None:
    transfer = format_transfer_figures([TransferFigures("TCP", 1 << 20, 2.0, 0.5, 1.0, 4.0)])
    assert cells(transfer, 2) == ["TCP", "1024", "2.00", "0.50", "1.00", "4.00", "0.12", "0.25"]
    ours, bare = Side([3.0, 2.0, 5.0], 0.5, 0.1, 0.02), Side([1.0, 1.0, 2.0], 0.25, 0.05)
    streams = StreamFigures(4, 5.0, 1000, 500, 2.0, 0.05, 0.5, (1 << 20, 2 << 20, 3 << 20, None))
    body = BodyFigures(60.0, 300.0, 6.0, 40.0)
    tables = format_proxy_figures(ProxyFigures([RequestFigures("streamed", 10, 100, ours, bare)], [streams], body))
    alone, many, open_ones = (part for part in tables.split("\n\n") if part.startswith("|"))
    assert cells(alone, 2) == ["streamed", "10", "3.00", "5.00", "1.00", "2.00", "2.00", "3.00"]
    assert cells(many, 2) == ["streamed", "10", "200", "400", "0.50", "1.00", "0.50", "0.50", "10000", "0.20"]
    assert cells(open_ones, 2)[:7] == ["4", "5", "500", "0.50", "50.0", "20000", "0.25"]
    assert cells(open_ones, 2)[7:] == ["1.0", "2.0", "3.0", "–"]
    assert "60 MiB" in tables
    assert "was 40 ms; before, 6 ms" in tables


def test_what_a_process_has_used() -> None:
    before = cpu_s(os.getpid())
    assert before is not None
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    after = cpu_s(os.getpid())
    assert after is not None
    assert 0.02 <= after - before < 1.0
    resident = resident_bytes(os.getpid())
    assert resident is not None
    assert resident > 1 << 20
    assert cpu_s(1 << 22) is None
    assert resident_bytes(1 << 22) is None
