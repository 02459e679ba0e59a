"""Tables for terminals and Markdown, and a progress bar where there is one to be had."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from epd.errors import ConfigError


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns line up in a terminal too; all but the first are set to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def number(value: float | None, digits: int = 0) -> str:
    """A figure with so many decimals; a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Whole milliseconds from ten upwards, one decimal below."""
    return number(value, 0 if value is not None and value >= 9.95 else 1)


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if tqdm is installed and somebody watches; gives what to call for each one done."""
    try:
        tqdm = importlib.import_module("tqdm")
    except ImportError:
        yield lambda: None
        return
    with tqdm.tqdm(total=total, desc=what, unit="req", mininterval=0.5, disable=None) as bar:
        yield lambda: bar.update() and None


def make_folder(path: Path, flag: str) -> None:
    """Make sure that results can go there, before the time for them is spent.

    Raises:
        ConfigError: it can't be made; names the flag.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error


def write_file(path: Path, content: str | bytes, flag: str) -> None:
    """Write a result.

    Raises:
        ConfigError: it can't be written; names the flag.
    """
    try:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error
