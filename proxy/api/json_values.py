"""How many values JSON has that clients put into other fields, such as schemas and arguments of tools."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 64
"""What templates and grammars do with it recurses."""
MAX_VALUES = 1 << 16
"""In the schemas of one request's tools, or in the arguments of its earlier calls."""


def count_values(value: Any, limit: int) -> int:
    """Members and items of JSON, at all levels. What is too much is not gone through.

    Args:
        value: decoded.
        limit: of what may be.

    Raises:
        ValueError: there are more, or levels are nested too deeply; it says which.
    """
    level, found = [value], 0
    for _ in range(MAX_DEPTH):
        containers = [one for one in level if isinstance(one, dict | list)]
        if not containers:
            return found
        found += sum(map(len, containers))
        if found > limit:
            raise ValueError(f"has too many values: at most {MAX_VALUES} in one request")
        level = [item for one in containers for item in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
