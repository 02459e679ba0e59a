from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from epd import cpu_runtime, launcher
from epd.cli import make_parser
from epd.config import PrefillDecodeConfig, ProxyConfig
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError
from epd.flags import read_flags
from epd.launcher import ChildSpec, Cluster, plan_cluster
from epd.up_config import UpConfig
from tests.ports import free_port


def test_plan_connects_everybody(tmp_path: Path) -> None:
    plan = plan_cluster(UpConfig(encoders=2, pds=2, proxies=2, port=7000, max_model_len=99), tmp_path)
    assert [spec.name for spec in plan] == [
        "encoder_0",
        "encoder_1",
        "prefill_decode_0",
        "prefill_decode_1",
        "proxy_7000",
        "proxy_7001",
    ]
    for proxy in plan[-2:]:
        for spec in plan[:4]:
            assert str(tmp_path / spec.name) in proxy.arguments
        assert proxy.arguments[proxy.arguments.index("--max-model-len") + 1] == "99"


def test_without_encoders_there_is_no_list_of_them(tmp_path: Path) -> None:
    assert "--encode-addr-list" not in plan_cluster(UpConfig(encoders=0), tmp_path)[-1].arguments


def test_parts_get_their_flags(tmp_path: Path) -> None:
    config = UpConfig(
        pipelining="off", enable_cuda_graphs=False, target_step_ms=0, failover_wait=0, allow_credentials=False
    )
    _, pd, proxy = (spec.arguments for spec in plan_cluster(config, tmp_path))
    parser = make_parser()
    of_pd = read_flags(PrefillDecodeConfig, parser.parse_args(pd))
    assert (of_pd.pipelining, of_pd.enable_cuda_graphs, of_pd.target_step_ms) == ("off", False, 0)
    of_proxy = read_flags(ProxyConfig, parser.parse_args(proxy))
    assert (of_proxy.failover_wait, of_proxy.allow_credentials) == (0, False)
    _, pd, proxy = (spec.arguments for spec in plan_cluster(UpConfig(), tmp_path))
    of_pd = read_flags(PrefillDecodeConfig, parser.parse_args(pd))
    assert (of_pd.pipelining, of_pd.enable_cuda_graphs) == ("auto", True)
    of_proxy = read_flags(ProxyConfig, parser.parse_args(proxy))
    assert of_proxy.failover_wait == ProxyConfig(model=CHECKPOINT_DIR).failover_wait


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "expected"), [(8, 1, None, 8), (8, 2, None, 4), (2, 3, None, 1), (8, 2, 5, 5)]
)
def test_workers_of_one_role_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, workers: int, threads: int | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    plan = plan_cluster(UpConfig(pds=workers, threads=threads), tmp_path)
    assert all(spec.arguments[spec.arguments.index("--threads") + 1] == str(expected) for spec in plan[:-1])


@pytest.mark.parametrize(
    ("cores", "config", "expected"),
    [
        (2, {}, True),
        (8, {"threads": 5}, True),
        (8, {"threads": 4}, False),
        (1, {}, False),
        (2, {"encoders": 2, "pds": 2}, False),
        (2, {"encoders": 0}, False),
    ],
)
def test_workers_with_more_threads_than_cores_take_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, config: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    plan = plan_cluster(UpConfig(**config), tmp_path)
    assert [("--share-cores" in spec.arguments) for spec in plan] == [expected] * (len(plan) - 1) + [False]


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]"), ("box", "box")],
)
def test_urls_are_those_that_clients_take(host: str, shown: str) -> None:
    cluster = Cluster(UpConfig(host=host, port=7000, proxies=2))
    cluster._folder.cleanup()
    assert cluster.base_urls == [f"http://{shown}:7000/v1", f"http://{shown}:7001/v1"]


class StubCluster(Cluster):
    """Children that are quick to start, in place of real ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
        super().__init__(UpConfig(port=free_port()))
        monkeypatch.setattr(launcher, "plan_cluster", lambda *_: [ChildSpec("child", ())])
        monkeypatch.setattr(launcher, "_COMMAND", ("/bin/sh", "-c", script))
        monkeypatch.setattr(launcher, "_FIRST_PAUSE_S", 0.01)

    async def pid(self, other_than: int = 0) -> int:
        async with asyncio.timeout(20):
            while "child" not in self.processes or self.processes["child"].pid == other_than:
                await asyncio.sleep(0.005)
        return self.processes["child"].pid


async def test_a_child_that_dies_is_named_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with StubCluster(monkeypatch, "exec sleep 60") as cluster:
        first = await cluster.pid()
        os.kill(first, signal.SIGKILL)
        assert await cluster.pid(other_than=first) != first
        assert "child died (killed by SIGKILL); starting it again" in caplog.text
        last = cluster.processes["child"]
    assert last.returncode == -signal.SIGTERM


async def test_workers_on_a_cpu_start_with_what_they_would_replace_themselves_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_runtime, "for_children", lambda: {"LD_PRELOAD": "", "MARK": "preloaded"})
    async with StubCluster(monkeypatch, "echo 12:00:00 $MARK >&2; exit 2") as cluster:
        await asyncio.wait_for(cluster.failure, 20)
    assert capsys.readouterr().err == "12:00:00 preloaded\n"


async def test_a_child_that_refuses_its_flags_ends_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    async with StubCluster(monkeypatch, "exit 2") as cluster:
        assert "child refused its configuration" in await asyncio.wait_for(cluster.failure, 20)
        with pytest.raises(ConfigError, match="child refused"):
            await cluster.wait_ready()


async def test_lines_that_are_no_log_lines_get_the_name_of_the_child(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with StubCluster(monkeypatch, "echo 12:00:00 INFO x >&2; echo Traceback >&2; exit 2") as cluster:
        await asyncio.wait_for(cluster.failure, 20)
    assert capsys.readouterr().err == "12:00:00 INFO x\nchild: Traceback\n"
