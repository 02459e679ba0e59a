"""How fields of configuration classes are declared: default, the text of `--help`, and what the flag looks like."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with a default and the text that `--help` shows.

    Args:
        metadata: metavar, choices, group; of numbers minimum, which each has, and maximum (`epd.number_flags.fault`).
    """
    return field(default=default, metadata={"help": help, **metadata})


def secret_option(default: Any, help: str, **metadata: Any) -> Any:
    """As `option`, for values that may hold a password: `repr` leaves them out."""
    return field(default=default, repr=False, metadata={"help": help, **metadata})


def required(help: str, **metadata: Any) -> Any:
    """A field that must be given."""
    return field(metadata={"help": help, **metadata})
