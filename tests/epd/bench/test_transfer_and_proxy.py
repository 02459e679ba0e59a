from __future__ import annotations

from pathlib import Path

import pytest

from epd.bench.proxy import ProxyBench, ProxyFigures, format_proxy_figures, run_proxy_bench
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
    """They run on uvloop, whose transports are not asyncio's."""
    assert main(["bench", "transfer", "--sizes", "4,64"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert main(["bench", "proxy", "--requests", "4", "--concurrency", "2", "--output-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["bench", "transfer", "--sizes", "much"]) == 2
    assert main(["bench", "proxy", "--requests", "0"]) == 2


async def test_proxy_against_the_bare_server() -> None:
    figures = await run_proxy_bench(ProxyBench(requests=8, concurrency=4, output_tokens=5, rounds=2))
    assert [one.tokens for one in figures] == [1, 5]
    for one in figures:
        assert min(one.front_ms, one.echo_ms, one.front_per_s, one.echo_per_s) > 0


async def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        await run_proxy_bench(ProxyBench(model=tmp_path))


def test_tables() -> None:
    transfer = format_transfer_figures([TransferFigures("TCP", 1 << 20, 2.0, 0.5, 1.0, 4.0)])
    assert cells(transfer, 2) == ["TCP", "1024", "2.00", "0.50", "1.00", "4.00", "0.12", "0.25"]
    proxy = format_proxy_figures([ProxyFigures("streamed", 10, 3.0, 1.0, 100, 400)])
    assert cells(proxy, 2) == ["streamed", "10", "3.00", "1.00", "2.00", "0.200", "100", "400", "0.25"]
