"""A picture of a load run: distributions, and the course over time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from epd.bench.output import write_file
from epd.bench.statistics import Record
from epd.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from epd.bench.serve import ServeReport

_COLOURS = {"text": "tab:blue", "image": "tab:orange"}


def require_matplotlib() -> None:
    """Raises ConfigError when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'epd[bench]'") from error


def plot_report(report: ServeReport, file: Path) -> None:
    """Write a PNG: how TTFT and the gaps between tokens are distributed, and how TTFT and duration went over time.

    Raises:
        ConfigError: the file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    figure.suptitle(f"{report.label}: {report.workload['mix']}, {report.pace}, {report.total.requests} requests")
    good = [record for record in report.requests if record.error is None]
    _distribution(axes[0, 0], good, "time to first token, ms", lambda record: [record.ttft_ms])
    _distribution(axes[0, 1], good, "between tokens, ms", lambda record: record.gaps_ms)
    _course(axes[1, 0], good, "time to first token, ms", lambda record: record.ttft_ms or 0.0)
    _course(axes[1, 1], good, "whole answer, ms", lambda record: record.e2e_ms)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(file, buffer.getvalue(), "--plot")


def _by_kind(records: Iterable[Record]) -> dict[str, list[Record]]:
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record.kind, []).append(record)
    return kinds


def _distribution(
    axes: Axes, records: list[Record], name: str, values: Callable[[Record], Iterable[float | None]]
) -> None:
    """Share of values at or below."""
    for kind, chosen in _by_kind(records).items():
        ordered = sorted(value for record in chosen for value in values(record) if value is not None)
        shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=kind, color=_COLOURS[kind])
    axes.set(xlabel=name, ylabel="share of values at or below", ylim=(0, 1))
    axes.grid(alpha=0.3)
    if records:
        axes.legend()


def _course(axes: Axes, records: list[Record], name: str, value: Callable[[Record], float]) -> None:
    for kind, chosen in _by_kind(records).items():
        starts = [record.start_ms / 1000 for record in chosen]
        axes.scatter(starts, [value(record) for record in chosen], s=9, label=kind, color=_COLOURS[kind])
    axes.set(xlabel="sent, s after the start", ylabel=name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if records:
        axes.legend()
