"""`epd bench serve`: load on any server that speaks the OpenAI API, and what its clients saw."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvloop

from epd.bench.http_client import HttpClient
from epd.bench.load import LoadRun, Pace, run_load
from epd.bench.output import markdown_table, milliseconds, number, progress, write_file
from epd.bench.probe import ServerTraits, probe
from epd.bench.statistics import Record, Slo, Summary, summarise_kinds
from epd.bench.workload import Workload, plan_requests
from epd.credentials import Credentials


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """One run of load. Constructors of the parts have checked their values."""

    base_url: str
    pace: Pace
    workload: Workload = field(default_factory=Workload)
    num_requests: int = 64
    model: str | None = None
    credentials: Credentials = Credentials()
    label: str | None = None
    """What tables call the server; None: its host and port."""
    slo: Slo = field(default_factory=Slo)
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0


class ServeReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of a run. Times in milliseconds unless a name ends in `_s`."""

    label: str
    model: str
    pace: str
    """Requests at once, or arrivals a second (`4/s`)."""
    workload: dict[str, Any]
    slo: Slo
    refused_fields: tuple[str, ...]
    """Optional fields that the server did not take; without `ignore_eos` an answer may end early."""
    duration_s: float
    client_cores: float
    rows: dict[str, Summary]
    """`all` or the only kind first, then each kind."""
    requests: list[Record] = []

    @property
    def total(self) -> Summary:
        """All requests."""
        return next(iter(self.rows.values()))


async def run_serve(bench: ServeBench, notify: Callable[[str], None] = lambda _: None) -> ServeReport:
    """Probe the server, make the requests, send them, sum up.

    Args:
        bench: what to do.
        notify: takes lines about what happens.

    Raises:
        ConfigError: the server does not answer a plain request.
    """
    client = HttpClient(bench.base_url, bench.credentials)
    try:
        traits = await probe(
            client,
            model=bench.model,
            ignore_eos=bench.ignore_eos,
            extra_body=bench.extra_body,
            seed=bench.workload.seed,
        )
        for name in traits.refused:
            notify(f"the server refuses {name}; going on without")
        requests = plan_requests(bench.workload, bench.num_requests, scale=traits.scale, fields=traits.fields)
        with progress(len(requests), f"{bench.workload.mix}, {bench.pace}") as done:
            run = await run_load(
                client, requests, bench.pace, timeout_s=bench.timeout_s, seed=bench.workload.seed, done=done
            )
    finally:
        client.close()
    return _report(bench, traits, run)


def _report(bench: ServeBench, traits: ServerTraits, run: LoadRun) -> ServeReport:
    return ServeReport(
        label=bench.label or urlsplit(bench.base_url).netloc,
        model=Path(traits.model).name,
        pace=str(bench.pace),
        workload=msgspec.to_builtins(bench.workload),
        slo=bench.slo,
        refused_fields=traits.refused,
        duration_s=run.duration_s,
        client_cores=run.client_cores,
        rows=summarise_kinds(run.records, run.duration_s, bench.slo),
        requests=run.records,
    )


HEADER = (
    "load", "ok/err", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "TPOT p50", "p90", "p99",
    "e2e p50", "p90", "p99", "out tok/s", "req/s", "goodput/s",
)  # fmt: skip


def summary_cells(summary: Summary) -> list[str]:
    """The cells of `HEADER` but the first."""
    times = [
        milliseconds(value)
        for figure in (summary.ttft_ms, summary.itl_ms, summary.tpot_ms, summary.e2e_ms)
        for value in (figure.p50, figure.p90, figure.p99)
    ]
    counts = f"{summary.succeeded}/{summary.requests - summary.succeeded}"
    rates = [
        number(summary.output_tokens_per_s, 1),
        number(summary.requests_per_s, 2),
        number(summary.goodput_per_s, 2),
    ]
    return [counts, *times, *rates]


def format_report(report: ServeReport) -> str:
    """A table, times in milliseconds, and what went wrong."""
    lines = [markdown_table(HEADER, [[kind, *summary_cells(row)] for kind, row in report.rows.items()]), ""]
    total = report.total
    if total.succeeded:
        lines.append(
            f"{total.prompt_tokens / total.succeeded:.0f} prompt and {total.output_tokens / total.succeeded:.0f} "
            f"output tokens a request on average, {report.duration_s:.1f} s in all; this client took "
            f"{report.client_cores:.2f} of a core."
        )
    lines += [f"{count} failed: {kind}" for kind, count in total.errors.items()]
    return "\n".join(lines)


def serve_and_print(bench: ServeBench, *, json: Path | None, plot: Path | None, fail_on_error: bool) -> int:
    """Run, print the table, write what was asked for. Returns the exit code.

    Raises:
        ConfigError: the server does not answer, a file can't be written, or matplotlib is missing for a plot.
    """
    if plot is not None:
        from epd.bench.plot import plot_report, require_matplotlib  # noqa: PLC0415 (an extra)

        require_matplotlib()
    report = uvloop.run(run_serve(bench, lambda line: print(line, file=sys.stderr)))
    print(format_report(report))
    if json is not None:
        write_file(json, msgspec.json.format(msgspec.json.encode(report)), "--json")
    if plot is not None:
        plot_report(report, plot)
    return 1 if fail_on_error and report.total.errors else 0
