"""Kernels are made here, or there is no compiler: tests of a kernel that is missing are skipped, and would hide why."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.engine.kernels import build

KERNELS = sorted(path.stem for path in Path(build.__file__).parent.glob("*.cpp"))


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_made_where_there_is_a_compiler(name: str) -> None:
    assert (build.load(name) is None) == (build.compiler() is None)
