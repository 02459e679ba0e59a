"""What README.md tells people to type, and where it sends them: commands that parse, flags and files that exist."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from epd.cli import make_parser
from epd.flag_aliases import RENAMED

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.startswith("epd ")]


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags_of(command)


@pytest.mark.parametrize("line", COMMANDS)
def test_what_it_prints_can_be_typed(line: str) -> None:
    make_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_its_flags_exist() -> None:
    renamed = {flag for flags in RENAMED.values() for flag in flags}
    known = {*flags_of(make_parser()), *renamed}
    named = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT)}
    assert len(named) > 80
    assert named - known == set()


def test_its_links_and_paths_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert [link for link in links if link.startswith("#") and link[1:] not in headings] == []
    paths = {link.partition("#")[0] for link in links}
    paths.update(re.findall(r"`((?:epd|proxy|workers|metastore|tests|deploy|\.ci)/[\w./-]*)`", TEXT))
    assert [path for path in paths if not (ROOT / path).exists()] == []
