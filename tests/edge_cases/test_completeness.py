"""Every case has a test that names its number."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"^(?:async )?def test_e(\d\d)_\w+\(", re.MULTILINE)


def test_all_forty_cases_have_tests() -> None:
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert {int(number) for source in sources for number in NAME.findall(source)} == set(range(1, 41))
