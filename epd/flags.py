"""Command-line flags made from the configuration classes, so that a default is written once.

A field `max_num_seqs: int` becomes `--max-num-seqs N`; tuples take several words, commas, a JSON list, or the flag
again; a truth value has two flags, `--enable-x` and `--no-enable-x`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import types
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from epd.errors import ConfigError
from epd.number_flags import number

ConfigT = TypeVar("ConfigT")

_EMPTY = "it is empty; give a value or leave the flag out"
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def _not_empty(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Parses words that say something: who writes --x "$UNSET" means neither the current folder nor all interfaces."""

    def parse(word: str) -> Any:
        if not word:
            raise argparse.ArgumentTypeError(_EMPTY)
        return kind(word)

    return parse


class HelpFormatter(argparse.HelpFormatter):
    """Wide enough that a flag and its explanation read as one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Add a flag for each field of the configuration class, except those that the parser has already."""
    hints = typing.get_type_hints(config)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(config):
        title = field.metadata.get("group")
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(parser if title is None else groups[title], field, hints[field.name])


class _Extend(argparse.Action):
    """A list that grows when its flag is repeated; the first time it takes the place of the default."""

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        known = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if known is self.default else [*known, *values])


def _add_flag(parser: argparse._ActionsContainer, field: dataclasses.Field[Any], hint: Any) -> None:
    value_type, is_list = _value_type(hint)
    is_required = field.default is dataclasses.MISSING
    flag, help_text = "--" + field.name.replace("_", "-"), str(field.metadata["help"])
    options: dict[str, Any] = {"required": is_required, "dest": field.name}
    if value_type is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        # The words of a list count together, and may have commas only.
        may_be_empty = value_type is not Path and (is_list or value_type is not str or field.default == "")
        parse = partial(number, flag, value_type) if value_type in (int, float) else value_type
        options["type"] = parse if may_be_empty else _not_empty(parse)
    if "choices" in field.metadata:
        options["choices"] = field.metadata["choices"]
        options["metavar"] = "|".join(field.metadata["choices"])
    elif value_type is not bool:
        options["metavar"] = field.metadata.get("metavar", _METAVARS[value_type])
    if is_list:
        options["nargs"] = "+"
        options["action"] = _Extend
    if not is_required:
        options["default"] = field.default
        if field.default not in (None, (), "") and "; default: " not in help_text:
            help_text += f" (default: {_shown(field.default)})"
    parser.add_argument(flag, help=help_text.replace("%", "%%"), **options)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _value_type(hint: Any) -> tuple[type[Any], bool]:
    """The type of one word of a flag, and whether it takes several."""
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def read_flags(config: type[ConfigT], arguments: argparse.Namespace) -> ConfigT:
    """The configuration that the parsed flags describe.

    Raises:
        ConfigError: a value that the configuration class refuses.
    """
    values, hints = {}, typing.get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]  # ConfigT is one of our dataclasses
        value = getattr(arguments, field.name)
        if isinstance(value, list):
            value = _split_words(value, hints[field.name], "--" + field.name.replace("_", "-"))
        values[field.name] = value
    try:
        return config(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _split_words(words: list[Any], hint: Any, flag: str) -> tuple[Any, ...]:
    if _value_type(hint)[0] is Path:  # whose names may have commas
        return tuple(words)
    found = tuple(part for word in words for part in _split(str(word)))
    if not found and "[]" not in words:  # no keys, where some were meant, would let everybody in
        raise ConfigError(f"{flag}: {_EMPTY}")
    return found


def _split(word: str) -> list[str]:
    if word.startswith("[") and word.endswith("]"):  # JSON, or an IPv6 address
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(word, type=list[str])
    return [part for part in word.split(",") if part]
