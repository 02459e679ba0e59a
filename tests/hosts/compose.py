"""The commands of `deploy/docker-compose.yml`, for hosts that are no containers: what is tested is what is shipped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

FILE = Path(__file__).resolve().parents[2] / "deploy" / "docker-compose.yml"
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def command(service: str, places: Mapping[str, str], variables: Mapping[str, str]) -> list[str]:
    """The words behind `epd` of a service.

    Args:
        service: its name in the file.
        places: what stands in the file → what it is here: paths and host names of the containers.
        variables: environment variables of the file; those that are not given have the file's defaults.
    """
    words = yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"][service]["command"]
    return [_fill_in(word, places, variables) for word in words]


def _fill_in(word: str, places: Mapping[str, str], variables: Mapping[str, str]) -> str:
    word = _VARIABLE.sub(lambda found: variables.get(found[1], found[2]), word)
    for there, here in places.items():
        word = word.replace(there, here)
    return word
