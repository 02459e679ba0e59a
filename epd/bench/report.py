"""`epd bench report`: all measurements in one Markdown file that names the machine, each with its command.

Each part runs as the very command that the file shows, so that anybody can run it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from epd.bench.children import free_port
from epd.bench.compare import compare, read_report
from epd.bench.load import Pace
from epd.bench.machine import describe_machine
from epd.bench.output import make_folder, markdown_table, write_file
from epd.bench.serve import ServeBench, ServeReport, run_serve
from epd.bench.workload import MIXES, Workload
from epd.errors import ConfigError
from epd.launcher import Cluster
from epd.up_config import UpConfig

_MODEL_NAME = "small"
_LABEL = "epd"
_REQUESTS = {1: 8, 4: 20, 16: 48}
"""Concurrency → requests of a load."""
_QUICK_REQUESTS = {1: 3, 4: 8}
_RATES = (2.0, 4.0)
_RATE_REQUESTS = 40
_WARM_UP = (("text", 4, 8), ("image", 4, 8))
"""Mix, concurrency and requests that nobody measures."""

Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ReportBench:
    """What goes into the file."""

    out: Path
    model: Path | None = None
    """None: a checkpoint of the size `small` is made for the run."""
    peers: tuple[Path, ...] = ()
    """JSON files of other servers under the same loads, written by `epd bench serve --json`."""
    json_dir: Path | None = None
    """Where the JSON of each load goes; None: nowhere."""
    settle_s: float = 0.0
    """Of steps before anything is measured, for what is compiled in the background."""
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further settings for `epd bench engine`."""
    up: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further settings of the cluster under load, as fields of `UpConfig`."""
    soak_requests: int = 200
    quick: bool = False
    """Fewer of all: to see that it works, not to measure."""


@dataclass(frozen=True)
class _Part:
    """One section: what it says, and the command whose output it holds."""

    title: str
    note: str
    arguments: tuple[str, ...]


async def run_report(bench: ReportBench, notify: Notify = lambda _: None) -> int:
    """Measure everything and write the file. Returns 1 when the soak found a violation or a request failed.

    Raises:
        ConfigError: a part cannot run, or the file can't be written.
    """
    started = time.monotonic()
    make_folder(bench.out.parent, "--out")
    if bench.json_dir is not None:
        make_folder(bench.json_dir, "--json-dir")
    peers = [read_report(path) for path in bench.peers]
    with tempfile.TemporaryDirectory(prefix="epd-bench-") as folder:
        model = bench.model or Path(folder) / _MODEL_NAME
        if bench.model is None:
            await _run_command(("checkpoint", "--size", "small", "--out", str(model)), notify)
        sections = []
        has_failed = False
        for part in _parts(bench, model):
            code, output = await _run_command(part.arguments, notify)
            if code not in (0, 1):
                raise ConfigError(f"epd bench {part.arguments[0]} failed, see its message above")
            has_failed |= code != 0
            sections.append(_section(part.title, part.note, [_shown(part.arguments, model)], output))
        reports = await _serve_all(bench, model, notify)
        has_failed |= any(report.total.errors for report in reports)
        sections.insert(1, _serve_section(bench, [*reports, *peers]))
    minutes = (time.monotonic() - started) / 60
    write_file(bench.out, "\n".join([_head(minutes, bench), *sections]), "--out")
    notify(f"written to {bench.out} after {minutes:.1f} minutes")
    return int(has_failed)


def _parts(bench: ReportBench, model: Path) -> list[_Part]:
    engine: tuple[str, ...] = (
        "engine",
        "--model",
        str(model),
        "--dtype",
        "bfloat16",
        "--settle",
        f"{bench.settle_s:g}",
    )
    if bench.engine:
        engine += ("--engine", json.dumps(bench.engine))
    quick: dict[str, tuple[str, ...]] = {"engine": (), "transfer": (), "proxy": ()}
    if bench.quick:
        quick = {
            "engine": ("--batch", "1,2", "--rounds", "2", "--steps", "2", "--prefill", "64"),
            "transfer": ("--sizes", "64,1024"),
            "proxy": ("--requests", "16", "--streams", "50", "--seconds", "2", "--body-mib", "2"),
        }
    return [
        _Part(
            "Engine",
            "Steps without a network. *step* is everything: scheduler, paged cache, model, sampling, outputs. *forward "
            "alone* is the model's part of the same steps. *transformers eager* is its own forward of the same weights "
            "with SDPA and its dynamic cache, without sampling, in turns with ours. The floors are the bytes that a "
            "step must read over the measured bandwidth, and the layers' products at the measured rate.",
            (*engine, *quick["engine"]),
        ),
        _Part(
            "Embedding transfer",
            "From the encoder's own code to another process. The copy in memory is measured in turns with it; small "
            "ones stay in the processor's caches, so their rates say little.",
            ("transfer", *quick["transfer"]),
        ),
        _Part(
            "HTTP front",
            "Before a worker that answers at once; *FastAPI* is a bare application on uvicorn that decodes the body to "
            "a dict and sends as much, a chunk for each token. Rates are with 16 requests at once. *CPU* and *a core* "
            "are by the processor time of the server's own process: load generator and worker share its cores.",
            ("proxy", "--model", str(model), *quick["proxy"]),
        ),
        _Part(
            "Soak",
            "Mixed requests on the demo model with a KV cache far too small, clients that hang up, every answer "
            "compared with the one given alone.",
            ("soak", "--requests", str(20 if bench.quick else bench.soak_requests)),
        ),
    ]


async def _run_command(arguments: Sequence[str], notify: Notify) -> tuple[int, str]:
    notify(f"epd bench {arguments[0]}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "epd", "bench", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode()


# -- load --------------------------------------------------------------------------------------------------------------


async def _serve_all(bench: ReportBench, model: Path, notify: Notify) -> list[ServeReport]:
    try:
        config = UpConfig(
            model=model,
            served_model_name=_MODEL_NAME,
            port=free_port(),
            **{"dtype": "bfloat16", "log_level": "warning", **bench.up},
        )
    except TypeError as error:
        raise ConfigError(f"--up: {error}") from error
    requests = _QUICK_REQUESTS if bench.quick else _REQUESTS
    loads: list[tuple[Pace, str, int]] = [
        (Pace(concurrency=concurrency), mix, count) for mix in MIXES for concurrency, count in requests.items()
    ]
    loads += [(Pace(rate=rate), "mixed", _RATE_REQUESTS) for rate in _RATES if not bench.quick]
    reports = []
    async with Cluster(config) as cluster:
        await cluster.wait_ready()
        url = cluster.base_urls[0]
        await _warm_up(url, bench.settle_s, notify)
        for seed, (pace, mix, count) in enumerate(loads):
            notify(f"serve: {mix}, {pace}")
            workload = Workload(mix=mix, seed=1000 + seed)
            report = await run_serve(
                ServeBench(base_url=url, pace=pace, workload=workload, num_requests=count, label=_LABEL)
            )
            reports.append(report)
            if bench.json_dir is not None:
                name = f"{_LABEL}-{mix}-{str(pace).replace('/', '-per-')}.json"
                write_file(bench.json_dir / name, msgspec.json.encode(report), "--json-dir")
    return reports


async def _warm_up(url: str, settle_s: float, notify: Notify) -> None:
    """A few requests of each kind, again and again until the time is over."""
    notify("serve: warming up")
    until = time.monotonic() + settle_s
    seed = 0
    while seed == 0 or time.monotonic() < until:
        for mix, concurrency, count in _WARM_UP:
            workload = Workload(mix=mix, output_tokens=16, seed=2000 + seed)
            pace = Pace(concurrency=concurrency)
            await run_serve(ServeBench(base_url=url, pace=pace, workload=workload, num_requests=count))
            seed += 1


# -- writing -----------------------------------------------------------------------------------------------------------


def _head(minutes: float, bench: ReportBench) -> str:
    rows = [[what, which] for what, which in describe_machine()]
    quick = "\n**A quick run, to see that it works: its figures mean little.**\n" if bench.quick else ""
    return (
        f"# Measurements\n\nWritten by `epd bench report` on {datetime.now(UTC):%Y-%m-%d} in {minutes:.0f} minutes, "
        f"load generator and servers on the same cores.\n{quick}\n{markdown_table(('machine', ''), rows)}\n\n"
        "The model of all parts but the soak is `epd bench checkpoint --size small`: 155 million random parameters in "
        "the shape of Qwen2.5-VL, bfloat16.\n"
    )


def _section(title: str, note: str, commands: Sequence[str], output: str) -> str:
    shown = "\n".join(commands)
    return f"## {title}\n\n{note}\n\n```\n{shown}\n```\n\n{output.strip()}\n"


def _serve_section(bench: ReportBench, reports: Sequence[ServeReport]) -> str:
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in bench.up.items())
    commands = [
        f"epd up --model DIR --dtype bfloat16{flags}",
        "epd bench serve --mix text|image|mixed --concurrency N --num-requests M --seed S",
    ]
    note = (
        "About 128 text tokens in, 64 out, one new 448×448 JPEG a request in *image* and in half of the requests in "
        "*mixed*; greedy, streamed; all prompts and pictures new. Times in milliseconds; `N/s` is an arrival rate. A "
        "p99 of few requests is in effect the slowest."
    )
    return _section("Load", note, commands, compare(reports, by_kind=True))


def _shown(arguments: Sequence[str], model: Path) -> str:
    """The command for people: without the folder of this run."""
    words = ["DIR" if word == str(model) else f"'{word}'" if "{" in word else word for word in arguments]
    return " ".join(["epd bench", *words])
