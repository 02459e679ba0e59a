"""Flags of `epd bench`. Each command imports only the parts that it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epd.bench.sizes import SIZES
from epd.flags import HelpFormatter

Command = Callable[[argparse.Namespace], int]


def add_bench(commands: Any) -> None:
    """Add `bench` and its own commands to the parser's `commands`."""
    summary = "measure: make load and random checkpoints, time each part against a floor"
    bench = commands.add_parser("bench", help=summary, description=_sentence(summary), formatter_class=HelpFormatter)
    benches = bench.add_subparsers(title="what to do", required=True, metavar="WHAT")
    _add_checkpoint(benches)


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
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights and vocabulary (default: %(default)s)"
    )


def _checkpoint(arguments: argparse.Namespace) -> int:
    from epd.bench.checkpoint import write_checkpoint

    write_checkpoint(arguments.size, arguments.out, seed=arguments.seed)
    print(f"{arguments.size} written to {arguments.out}")
    return 0
