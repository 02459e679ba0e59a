"""Flags of `epd bench`. Each command imports only the parts that it runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epd.bench.sizes import SIZES
from epd.credentials import add_credentials, read_credentials
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError
from epd.flags import HelpFormatter
from epd.model_options import MOST_TOKENS
from epd.number_flags import (
    COUNT,
    MOST_PROCESSES,
    MOST_THREADS,
    NOT_NEGATIVE,
    POSITIVE,
    PROCESSES,
    SHARE,
    WHOLE,
    NumberRange,
    add_number,
)

if TYPE_CHECKING:
    from epd.bench.serve import ServeBench

Command = Callable[[argparse.Namespace], int]
REQUESTS = NumberRange(int, 1, 10**7)
"""Each takes memory."""
AT_ONCE = NumberRange(int, 1, 10**5)
"""Connections: a host has about so many."""
TOKENS = NumberRange(int, 1, MOST_TOKENS)


def add_bench(commands: Any) -> None:
    """Add `bench` and its own commands to the parser's `commands`."""
    summary = "measure: make load and random checkpoints, time each part against a floor"
    bench = commands.add_parser("bench", help=summary, description=_sentence(summary), formatter_class=HelpFormatter)
    benches = bench.add_subparsers(title="what to do", required=True, metavar="WHAT")
    _add_checkpoint(benches)
    _add_serve(benches)
    _add_compare(benches)
    _add_engine(benches)
    _add_transfer(benches)
    _add_proxy(benches)
    _add_soak(benches)
    _add_report(benches)


def _add(benches: Any, name: str, command: Command, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benches.add_parser(
        name, help=summary, description=_sentence(summary), formatter_class=HelpFormatter
    )
    parser.set_defaults(command=command)
    return parser


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


# -- checkpoint ------------------------------------------------------------------------------------------------------


def _add_checkpoint(benches: Any) -> None:
    parser = _add(
        benches,
        "checkpoint",
        _checkpoint,
        "write a checkpoint of random weights; the large sizes without weights, for --load-format dummy",
    )
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help="shape of the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    add_number(parser, "--seed", WHOLE, default=0, help="of weights and vocabulary (default: %(default)s)")


def _checkpoint(arguments: argparse.Namespace) -> int:
    _require_worker_packages()
    from epd.bench.checkpoint import write_checkpoint

    write_checkpoint(arguments.size, arguments.out, seed=arguments.seed)
    print(f"{arguments.size} written to {arguments.out}")
    return 0


# -- serve -----------------------------------------------------------------------------------------------------------


def _add_serve(benches: Any) -> None:
    parser = _add(benches, "serve", _serve, "put load on any server that speaks the OpenAI API, and time its answers")
    parser.add_argument("--base-url", default="http://127.0.0.1:5580/v1", metavar="URL", help=_default("of the server"))
    parser.add_argument("--model", metavar="NAME", help="model to ask (default: the first that the server lists)")
    add_credentials(parser, os.environ)
    parser.add_argument("--label", metavar="TEXT", help="what tables call the server (default: its host and port)")
    pace = parser.add_mutually_exclusive_group()
    add_number(pace, "--concurrency", AT_ONCE, help="requests at once, in a closed loop (default: 1)")
    add_number(pace, "--rate", POSITIVE, help="requests a second, arriving at random (Poisson)")
    add_number(parser, "--num-requests", REQUESTS, default=64, help=_default("requests in all"))
    _add_workload(parser)
    add_number(parser, "--slo-ttft-ms", NOT_NEGATIVE, help="a good answer begins within (default: any)")
    add_number(parser, "--slo-tpot-ms", NOT_NEGATIVE, help="and takes so long a token at most (default: any)")
    parser.add_argument("--no-ignore-eos", action="store_true", help="let the model end its answers")
    parser.add_argument("--extra-body", default="{}", metavar="JSON", help="further fields of each request")
    add_number(parser, "--timeout", POSITIVE, default=600.0, metavar="S", help=_default("seconds for one request"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, each request's too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw distributions and course there, as PNG")
    parser.add_argument("--fail-on-error", action="store_true", help="exit with 1 when a request failed")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mix", choices=("text", "image", "mixed"), default="text", help=_default("kinds of requests"))
    add_number(parser, "--image-share", SHARE, default=0.5, help=_default("of `mixed` with pictures"))
    parser.add_argument("--image-size", default="448x448", metavar="WxH", help=_default("pixels of a picture"))
    add_number(parser, "--images-per-request", NumberRange(int, 1, 1024), default=1, help=_default("pictures in one"))
    add_number(
        parser,
        "--repeat-share",
        SHARE,
        default=0.0,
        metavar="X",
        help=_default("requests with pictures that show an earlier one's"),
    )
    add_number(parser, "--input-tokens", TOKENS, default=128, help=_default("tokens of text, about"))
    add_number(parser, "--output-tokens", TOKENS, default=64, help=_default("tokens of an answer"))
    add_number(parser, "--seed", WHOLE, default=0, help=_default("of prompts, pictures, arrivals"))


def _default(text: str) -> str:
    return f"{text} (default: %(default)s)"


def _serve(arguments: argparse.Namespace) -> int:
    from epd.bench.serve import serve_and_print

    return serve_and_print(
        _serve_bench(arguments),
        json=arguments.json,
        plot=arguments.plot,
        fail_on_error=arguments.fail_on_error,
    )


def _serve_bench(arguments: argparse.Namespace) -> ServeBench:
    from epd.bench.load import Pace
    from epd.bench.serve import ServeBench
    from epd.bench.statistics import Slo
    from epd.bench.workload import Workload

    concurrency = 1 if arguments.rate is None and arguments.concurrency is None else arguments.concurrency
    names = ("mix", "image_share", "images_per_request", "repeat_share", "input_tokens", "output_tokens", "seed")
    return ServeBench(
        base_url=arguments.base_url,
        model=arguments.model,
        credentials=read_credentials(arguments),
        label=arguments.label,
        pace=Pace(concurrency=concurrency, rate=arguments.rate),
        num_requests=arguments.num_requests,
        workload=Workload(**{name: getattr(arguments, name) for name in names}, image_size=_size(arguments.image_size)),
        slo=Slo(ttft_ms=arguments.slo_ttft_ms, tpot_ms=arguments.slo_tpot_ms),
        ignore_eos=not arguments.no_ignore_eos,
        extra_body=_object(arguments.extra_body, "--extra-body"),
        timeout_s=arguments.timeout,
    )


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height)
    except ValueError as error:
        raise ConfigError(f"--image-size {text}: want WIDTHxHEIGHT, such as 448x448") from error


def _object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{flag}: want a JSON object")
    return value


# -- compare ---------------------------------------------------------------------------------------------------------


def _add_compare(benches: Any) -> None:
    parser = _add(benches, "compare", _compare, "make one Markdown table out of the JSON files of `serve`")
    parser.add_argument("reports", nargs="+", type=Path, metavar="FILE", help="written by `epd bench serve --json`")
    parser.add_argument("--by-kind", action="store_true", help="rows for text and image requests of mixed loads too")


def _compare(arguments: argparse.Namespace) -> int:
    from epd.bench.compare import compare, read_report

    print(compare([read_report(path) for path in arguments.reports], by_kind=arguments.by_kind))
    return 0


# -- engine ----------------------------------------------------------------------------------------------------------


def _add_engine(benches: Any) -> None:
    parser = _add(
        benches,
        "engine",
        _engine,
        "time steps of the engine without a network, against transformers alone and the machine's floors",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=_default("precision")
    )
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help=_default("dummy: no weights"))
    add_number(
        parser,
        "--threads",
        NumberRange(int, 1, MOST_THREADS),
        help="CPU threads of both sides (default: torch's choice)",
    )
    parser.add_argument("--batch", default="1,4,16", metavar="N,N", help=_default("requests that decode together"))
    add_number(parser, "--context", TOKENS, default=192, help=_default("tokens of each before"))
    add_number(parser, "--prefill", TOKENS, default=512, help=_default("tokens of the measured prompt"))
    add_number(parser, "--rounds", REQUESTS, default=5, help=_default("turns of each side"))
    add_number(parser, "--steps", REQUESTS, default=8, help=_default("decode steps in a turn"))
    add_number(
        parser,
        "--settle",
        NOT_NEGATIVE,
        default=0.0,
        metavar="S",
        help=_default("seconds to wait at most for a step that is compiled in the background"),
    )
    parser.add_argument("--engine", default="{}", metavar="JSON", help="further settings of the engine, by their names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")


def _engine(arguments: argparse.Namespace) -> int:
    import msgspec

    from epd.bench.output import write_file

    _require_worker_packages()
    from epd.bench.engine import EngineBench, format_engine_figures, run_engine_bench

    try:
        batches = tuple(int(word) for word in arguments.batch.split(","))
    except ValueError as error:
        raise ConfigError(f"--batch {arguments.batch}: want numbers with commas between them") from error
    names = ("model", "dtype", "load_format", "threads", "context", "prefill", "rounds", "steps")
    bench = EngineBench(
        **{name: getattr(arguments, name) for name in names},
        batches=batches,
        settle_s=arguments.settle,
        engine=_object(arguments.engine, "--engine"),
    )
    figures = run_engine_bench(bench, _tell)
    print(format_engine_figures(figures))
    if arguments.json is not None:
        write_file(arguments.json, msgspec.json.format(msgspec.json.encode(figures)), "--json")
    return 0


def _require_worker_packages() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"this needs {' and '.join(missing)}: pip install 'epd[worker]'")


# -- transfer and proxy ------------------------------------------------------------------------------------------------


def _add_transfer(benches: Any) -> None:
    parser = _add(benches, "transfer", _transfer, "time embeddings on their way to another process, against memcpy")
    parser.add_argument("--sizes", metavar="KiB,KiB", help="of the embeddings (default: 64 to 65536, times four each)")


def _transfer(arguments: argparse.Namespace) -> int:
    import uvloop

    from epd.bench.transfer import SIZES, format_transfer_figures, run_transfer_bench

    try:
        sizes = [int(word) << 10 for word in arguments.sizes.split(",")] if arguments.sizes else SIZES
    except ValueError as error:
        raise ConfigError(f"--sizes {arguments.sizes}: want numbers with commas between them") from error
    print(format_transfer_figures(uvloop.run(run_transfer_bench(sizes, _tell))))
    return 0


def _add_proxy(benches: Any) -> None:
    parser = _add(benches, "proxy", _proxy, "time the HTTP front before a worker that answers at once, against FastAPI")
    parser.add_argument(
        "--model", type=Path, default=CHECKPOINT_DIR, metavar="DIR", help="its tokenizer is used (default: the demo's)"
    )
    add_number(parser, "--requests", REQUESTS, default=1000, help=_default("of each side, for each row"))
    add_number(parser, "--concurrency", AT_ONCE, default=16, help=_default("requests at once"))
    add_number(parser, "--output-tokens", TOKENS, default=64, help=_default("tokens of a stream"))
    add_number(parser, "--streams", AT_ONCE, default=1000, help=_default("streams open at once"))
    add_number(parser, "--seconds", COUNT, default=20, help=_default("for which they are open"))
    add_number(parser, "--body-mib", NumberRange(int, 1, 4096), default=60, help=_default("MiB of the large body"))


def _proxy(arguments: argparse.Namespace) -> int:
    import uvloop

    from epd.bench.proxy import ProxyBench, format_proxy_figures, run_proxy_bench

    names = ("model", "requests", "concurrency", "output_tokens", "streams", "seconds", "body_mib")
    bench = ProxyBench(**{name: getattr(arguments, name) for name in names})
    print(format_proxy_figures(uvloop.run(run_proxy_bench(bench, _tell))))
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -- soak ------------------------------------------------------------------------------------------------------------


def _add_soak(benches: Any) -> None:
    parser = _add(
        benches,
        "soak",
        _soak,
        "ask a cluster of its own thousands of mixed questions with far too little memory, and check every answer",
    )
    add_number(parser, "--requests", REQUESTS, default=2000, help=_default("requests in all"))
    add_number(parser, "--concurrency", AT_ONCE, default=24, help=_default("requests at once"))
    add_number(parser, "--pool", REQUESTS, default=42, help=_default("distinct requests"))
    add_number(parser, "--abort-share", SHARE, default=0.15, help=_default("requests whose client hangs up"))
    add_number(parser, "--kv-cache-memory-bytes", COUNT, default=2 << 20, help=_default("of each PD, small on purpose"))
    add_number(parser, "--encoders", NumberRange(int, 0, MOST_PROCESSES), default=1, help=_default("encoder workers"))
    add_number(parser, "--pds", PROCESSES, default=1, help=_default("prefill-decode workers"))
    parser.add_argument("--compiled", action="store_true", help="begin when the steps of all workers are compiled")
    add_number(parser, "--seed", WHOLE, default=0, help=_default("of questions and their order"))


def _soak(arguments: argparse.Namespace) -> int:
    from epd.bench.soak import SoakBench, soak_and_print
    from epd.observability import setup_logging

    setup_logging("soak", "warning")
    names = {field.name for field in dataclasses.fields(SoakBench)} & vars(arguments).keys()
    return soak_and_print(SoakBench(**{name: getattr(arguments, name) for name in names}))


# -- report ----------------------------------------------------------------------------------------------------------


def _add_report(benches: Any) -> None:
    parser = _add(benches, "report", _report, "run all measurements and write one Markdown file that names the machine")
    parser.add_argument("--out", type=Path, default=Path("BENCHMARKS.md"), metavar="FILE", help=_default("to write"))
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint (default: one of size small is made)")
    parser.add_argument(
        "--peers", type=Path, nargs="+", default=[], metavar="FILE", help="other servers' JSON, for the load table"
    )
    parser.add_argument("--json-dir", type=Path, metavar="DIR", help="write the JSON of each load there")
    add_number(
        parser, "--settle", NOT_NEGATIVE, default=0.0, metavar="S", help=_default("seconds of work before measuring")
    )
    parser.add_argument("--engine", default="{}", metavar="JSON", help="further settings for `epd bench engine`")
    parser.add_argument(
        "--up", default="{}", metavar="JSON", help='further settings of `epd up`, such as {"threads": 2}'
    )
    add_number(parser, "--soak-requests", REQUESTS, default=200, help=_default("of the soak"))
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")


def _report(arguments: argparse.Namespace) -> int:
    import asyncio

    from epd.bench.report import ReportBench, run_report
    from epd.observability import setup_logging

    _require_worker_packages()
    setup_logging("report", "warning")
    bench = ReportBench(
        out=arguments.out,
        model=arguments.model,
        peers=tuple(arguments.peers),
        json_dir=arguments.json_dir,
        settle_s=arguments.settle,
        engine=_object(arguments.engine, "--engine"),
        up=_object(arguments.up, "--up"),
        soak_requests=arguments.soak_requests,
        quick=arguments.quick,
    )
    return asyncio.run(run_report(bench, _tell))
