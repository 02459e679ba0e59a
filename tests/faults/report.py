"""The table of `make faults`, for the terminal and for README.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from tests.faults.figures import Row

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: written by the command above -->", "<!-- end of table -->"
_TITLES = (
    "fault",
    "requests",
    "answered right",
    "refused, tried again",
    "failed, told so",
    "silent losses",
    "added p50, ms",
    "added p99, ms",
    "longest wait, s",
    "recovery, s",
    "",
)


def line(row: Row) -> str:
    """One row for the terminal, with whatever was wrong."""
    text = (
        f"{row.title}: {row.right} of {row.requests} right ({100 * row.success:.1f} %), {row.refused} refusals, "
        f"{row.num_failed} failed, {len(row.lost)} lost, added p50 {_figure(row.added_p50_ms)} ms, "
        f"p99 {_figure(row.added_p99_ms)} ms, longest wait {row.longest_wait_s:.2f} s, "
        f"recovery {_figure(row.recovery_s, 1)} s"
    )
    details = [f"failed {count} times: {reason}" for reason, count in row.failed.items()]
    details += [f"LOST: {one[:500]}" for one in row.lost]
    details += [f"PROBLEM: {one}" for one in row.problems]
    details += [f"slow: {one}" for one in row.slowest]
    details += [f"note: {row.note}"] if row.note else []
    return "\n    ".join([text, *details])


def table(rows: Sequence[Row]) -> str:
    """All rows in Markdown."""
    lines = [_cells(_TITLES), _cells(["---", *["---:"] * (len(_TITLES) - 2), "---"])]
    lines += [_cells(_values(row)) for row in rows]
    return "\n".join(lines)


def _values(row: Row) -> list[str]:
    remarks = [row.note] if row.note else []
    remarks += [f"**{len(row.problems)} problems**"] if row.problems else []
    return [
        row.title,
        str(row.requests),
        f"{100 * row.success:.1f} %",
        str(row.refused),
        str(row.num_failed),
        str(len(row.lost)),
        _figure(row.added_p50_ms),
        _figure(row.added_p99_ms),
        f"{row.longest_wait_s:.2f}",
        _figure(row.recovery_s, 1),
        "; ".join(remarks).replace("|", "/"),
    ]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def write(rows: Sequence[Row], minutes: float) -> None:
    """Put the table into README.md, between its two marks."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    requests, lost = sum(row.requests for row in rows), sum(len(row.lost) for row in rows)
    machine = f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    summary = f"{requests} requests under {len(rows)} faults, {lost} silent losses; {minutes:.0f} minutes on {machine}."
    README.write_text(f"{before}{BEGIN}\n\n{summary}\n\n{table(rows)}\n\n{END}{after}", encoding="utf-8")
