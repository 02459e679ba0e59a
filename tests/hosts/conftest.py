from __future__ import annotations

import pytest

from tests.hosts.netns import why_not


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> None:
    """Skip everything here where the kernel has no such hosts."""
    if reason := why_not():
        pytest.skip(reason)
