"""`python -m tests.faults`: the whole fault suite, or some faults of it. Exit code 1: something was lost or wrong."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from tests.faults.faults import FAULTS
from tests.faults.figures import Row
from tests.faults.report import line, table, write
from tests.faults.suite import Plan, run_suite


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into tests/faults/README.md")
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], help="these faults only")
    parser.add_argument("--rate", type=float, default=Plan.rate, help="requests a second (default: %(default)s)")
    parser.add_argument("--quiet", type=float, default=Plan.quiet_s, help="seconds of quiet traffic before each fault")
    parser.add_argument("--folder", type=Path, help="for the logs of all processes; default: a temporary one")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write: the table has all faults")
    chosen = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="epd-faults-"))
    logging.basicConfig(level=logging.WARNING)
    print(f"{len(chosen)} faults; logs in {folder}", flush=True)
    begin = time.monotonic()
    plan = Plan(rate=options.rate, quiet_s=options.quiet)
    rows = uvloop.run(run_suite(chosen, plan, folder, lambda row: print(line(row), flush=True)))
    print(f"\n{table(rows)}")
    if options.write:
        write(rows, (time.monotonic() - begin) / 60)
    return 1 if any(_is_bad(row) for row in rows) else 0


def _is_bad(row: Row) -> bool:
    return bool(row.lost or row.problems)


if __name__ == "__main__":
    sys.exit(main())
