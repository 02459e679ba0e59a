"""Which numbers flags take: none that are NaN, out of range, or so large that something breaks far from the flag."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from epd.errors import ConfigError

MOST_WHOLE = 10**15
"""Of counts and bytes, where a flag has no maximum of its own."""
MOST_FRACTIONAL = 10**9
"""Of seconds and the like: thirty years. Threads and timers of the system can't wait much longer."""
MOST_THREADS = 1024
"""Of one process."""
MOST_PROCESSES = 256
"""Of one kind, on one host."""
LAST_PORT = 65535


def fault(value: float, minimum: float, maximum: float | None = None) -> str | None:
    """What is wrong with a number, for an error that names its flag; None: nothing.

    Args:
        value: may be NaN or infinite, which are wrong.
        minimum: the least that is right.
        maximum: the most; None: `MOST_WHOLE` or `MOST_FRACTIONAL`.
    """
    if maximum is None:
        maximum = MOST_WHOLE if isinstance(value, int) else MOST_FRACTIONAL
    if not value >= minimum:  # so that NaN is wrong
        return f"want at least {minimum}"
    return f"want at most {maximum}" if value > maximum else None


@dataclass(frozen=True)
class NumberRange:
    """What a flag outside of the configuration classes takes."""

    kind: type[int] | type[float]
    minimum: float
    maximum: float | None = None
    """As in `fault`."""


WHOLE = NumberRange(int, 0)
COUNT = NumberRange(int, 1)
PROCESSES = NumberRange(int, 1, MOST_PROCESSES)
NOT_NEGATIVE = NumberRange(float, 0)
POSITIVE = NumberRange(float, 0.001)
SHARE = NumberRange(float, 0, 1)


def add_number(parser: argparse._ActionsContainer, flag: str, range_: NumberRange, **options: Any) -> None:
    """Add a flag for a number. `options`: those of argparse's `add_argument`.

    Parsing it raises ConfigError, which argparse passes on: the number is none, or out of range.
    """

    def parse(word: str) -> float:
        value = number(flag, range_.kind, word)
        wrong = fault(value, range_.minimum, range_.maximum)
        if wrong is not None:
            raise ConfigError(f"{flag} {word}: {wrong}")
        return value

    options.setdefault("metavar", "N" if range_.kind is int else "X")
    parser.add_argument(flag, type=parse, **options)


def number(flag: str, kind: type[int] | type[float], word: str) -> float:
    """What a word of the flag says, whatever its range.

    Raises:
        ConfigError: it is no such number.
    """
    try:
        return kind(word)
    except ValueError:
        raise ConfigError(f"{flag} {word}: want a {'whole ' if kind is int else ''}number") from None
