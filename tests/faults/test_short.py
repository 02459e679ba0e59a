"""The fault suite in short: one fault after the other, nothing mended in between. `make faults` has all of them."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.faults import FAULTS
from tests.faults.figures import Row
from tests.faults.report import line
from tests.faults.suite import Plan, run_suite

NAMES = ("encoder", "pd", "flush", "garbage", "redis", "proxy")
"""After these, one proxy, one encoder and one PD are left, and no Redis."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    by_name = {fault.name: fault for fault in FAULTS}
    plan = Plan(quiet_s=1.0, watch_s=2.0, rate=5.0, streams=4, pool=6, mends=False)
    faults = [by_name[name] for name in NAMES]
    found = asyncio.run(run_suite(faults, plan, tmp_path_factory.mktemp("faults")))
    return dict(zip(NAMES, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_request_is_answered_right(rows: dict[str, Row], name: str) -> None:
    row = rows[name]
    print(line(row))
    assert row.lost == []
    assert row.problems == []
    assert row.failed == {}
    assert row.right == row.requests > 0


def test_a_client_is_refused_only_where_a_proxy_died(rows: dict[str, Row]) -> None:
    assert {name: row.refusals for name, row in rows.items() if row.refused and name != "proxy"} == {}
    assert rows["proxy"].refused > 0
