"""`epd bench compare`: one table out of the JSON files of several load runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from epd.bench.output import markdown_table, milliseconds, number
from epd.bench.serve import ServeReport
from epd.bench.statistics import Summary
from epd.errors import ConfigError

HEADER = (
    "server", "load", "conc.", "ok/err", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "TPOT p50", "e2e p50",
    "out tok/s", "req/s",
)  # fmt: skip
_MIXES = ("text", "image", "mixed")


def read_report(path: Path) -> ServeReport:
    """A run's JSON.

    Raises:
        ConfigError: it can't be read, or is no such JSON.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServeReport)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no output of `epd bench serve --json`: {error}") from error


def compare(reports: Sequence[ServeReport], *, by_kind: bool = False) -> str:
    """A Markdown table, one row for each server and load; times in milliseconds.

    Args:
        reports: in the order of their servers; loads are sorted within a server.
        by_kind: rows for text and image requests of mixed loads too.
    """
    servers = list(dict.fromkeys(report.label for report in reports))
    ordered = sorted(
        reports, key=lambda one: (servers.index(one.label), _MIXES.index(one.workload["mix"]), _pace_key(one.pace))
    )
    rows = []
    for report in ordered:
        rows.append(_row(report, report.workload["mix"], report.total))
        if by_kind and len(report.rows) > 1:
            rows += [_row(report, f"– {kind}", row) for kind, row in list(report.rows.items())[1:]]
    return markdown_table(HEADER, rows)


def _pace_key(pace: str) -> tuple[bool, float]:
    return pace.endswith("/s"), float(pace.removesuffix("/s"))


def _row(report: ServeReport, load: str, row: Summary) -> list[str]:
    times = (row.ttft_ms.p50, row.ttft_ms.p99, row.itl_ms.p50, row.itl_ms.p99, row.tpot_ms.p50, row.e2e_ms.p50)
    counts = f"{row.succeeded}/{row.requests - row.succeeded}"
    rates = (number(row.output_tokens_per_s, 1), number(row.requests_per_s, 2))
    return [report.label, load, report.pace, counts, *map(milliseconds, times), *rates]
