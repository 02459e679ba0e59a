"""What `deploy/gpu-check.sh` runs: right values first, then speed against what the hardware gives. Writes a report."""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from tests.gpu import numerics, speed

EXIT_MISSED = 1
EXIT_NO_CUDA = 2


@dataclass
class Report:
    """Rows of (what, found, wanted, as wanted) under headings; None: not judged."""

    sections: dict[str, list[tuple[str, str, str, bool | None]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, section: str, what: str, found: str, wanted: str = "", is_met: bool | None = None) -> None:
        """Add a row; one that is not as wanted fails the check."""
        print(f"{section}: {what}: {found}{f' (wanted: {wanted})' if wanted else ''}", flush=True)
        self.sections.setdefault(section, []).append((what, found, wanted, is_met))
        if is_met is False:
            self.failures.append(what)

    def markdown(self) -> str:
        """The whole report."""
        lines = ["# GPU check", ""]
        for section, rows in self.sections.items():
            lines += [f"## {section}", "", "| what | found | wanted | |", "|---|---|---|---|"]
            marks = {True: "yes", False: "**no**", None: ""}
            lines += [f"| {what} | {found} | {wanted} | {marks[is_met]} |" for what, found, wanted, is_met in rows]
            lines.append("")
        verdict = f"Not as wanted: {'; '.join(self.failures)}." if self.failures else "Everything judged is as wanted."
        return "\n".join([*lines, verdict, ""])


def main(arguments: list[str] | None = None) -> int:
    """Run the check. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="deploy/gpu-check.sh")
    parser.add_argument("report", type=Path, help="Markdown file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("7b", "tiny"), default="7b", help="shapes for the speed figures")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --size tiny makes a dry run", file=sys.stderr)
        return EXIT_NO_CUDA
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report = Report()
    started = time.monotonic()
    _describe(report, options.device)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in _parts(Path(folder), options.device, options.size).items():
            try:
                part(report)
            except Exception as error:  # one part that fails must not hide what the others find
                logging.exception("%s failed", name)
                report.add(name, "ran to its end", f"{type(error).__name__}: {error}", "no error", False)
    report.add("Machine", "time for all of this", f"{time.monotonic() - started:.0f} s")
    options.report.write_text(report.markdown(), encoding="utf-8")
    print(f"report: {options.report}")
    return EXIT_MISSED if report.failures else 0


def _parts(folder: Path, device: str, size: str) -> dict[str, Callable[[Report], None]]:
    return {
        "Values": lambda report: numerics.check(report, folder, device),
        "Speed": lambda report: speed.check(report, folder, device, size),
    }


def _describe(report: Report, device: str) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report.add("Machine", "device", name)
    versions = f"{platform.python_version()}, {torch.__version__}, {transformers.__version__}"
    report.add("Machine", "Python, torch, transformers", versions)
    if device == "cuda":
        report.add("Machine", "CUDA of torch", str(torch.version.cuda))


if __name__ == "__main__":
    sys.exit(main())
