"""Several models behind one proxy, with fake workers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from epd.checkpoint import fingerprint
from epd.config import ProxyConfig
from epd.errors import ConfigError
from epd.messages import WorkerInfo
from epd.types import WorkerRole
from proxy.cluster import worker_connection
from proxy.models import catalog as model_catalog
from proxy.models.catalog import MAX_NAME_CHARACTERS, MEMORY_S, ModelCatalog, ModelRef
from proxy.service import Service
from tests.proxy.conftest import ask, eventually, png, serve
from tests.proxy.fakes import FakeEncoder, FakePrefillDecode, FakeWorker
from tests.proxy.model_files import write_model


def write_variant(folder: Path, **config: Any) -> Path:
    """A checkpoint with another fingerprint."""
    write_model(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints: `red` and `blue`."""
    root = tmp_path_factory.mktemp("models")
    for name in ("red", "blue"):
        write_variant(root / name, variant=name)
    return root


W = TypeVar("W", bound=FakeWorker)


class Fleet:
    """A proxy and workers of several models."""

    def __init__(self, stack: AsyncExitStack, sockets: Path) -> None:
        self._stack, self._sockets = stack, sockets
        self._addresses: dict[type[FakeWorker], list[str]] = {FakePrefillDecode: [], FakeEncoder: []}

    async def start(self, num_pds: int, num_encoders: int, **config: Any) -> None:
        """The proxy, with addresses where workers may come."""
        pds = [str(self._sockets / f"p{i}") for i in range(num_pds)]
        encoders = [str(self._sockets / f"e{i}") for i in range(num_encoders)]
        self._addresses = {FakePrefillDecode: pds[::-1], FakeEncoder: encoders[::-1]}
        settings = ProxyConfig(pd_addr_list=tuple(pds), encode_addr_list=tuple(encoders), **config)
        self.service, url = await self._stack.enter_async_context(serve(settings))
        self.http = httpx.AsyncClient(base_url=url, timeout=20, trust_env=False, verify=False)
        self._stack.push_async_callback(self.http.aclose)

    async def pd(self, folder: Path, name: str = "", answer: tuple[int, ...] = (5,)) -> FakePrefillDecode:
        """A PD that is up."""
        pd = FakePrefillDecode(self._addresses[FakePrefillDecode].pop(), fingerprint(folder))
        pd.answer = answer
        return await self._up(pd, name)

    async def encoder(self, folder: Path, name: str = "") -> FakeEncoder:
        """An encoder that is up."""
        return await self._up(FakeEncoder(self._addresses[FakeEncoder].pop(), fingerprint(folder)), name)

    async def _up(self, worker: W, name: str) -> W:
        worker.served_model_name = name
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        await eventually(lambda: any(self._is_up(worker)))
        await eventually(lambda: self.service.catalog.checkpoint(worker.model))
        return worker

    def _is_up(self, worker: FakeWorker) -> list[bool]:
        return [one.is_ready for one in self.service.pool.connections() if one.member.address == worker.address]

    async def chat(self, model: str | None, *content: str | bytes) -> httpx.Response:
        body = {"messages": ask(*content), "max_tokens": 1} | ({} if model is None else {"model": model})
        return await self.http.post("/v1/chat/completions", json=body)

    async def health(self) -> tuple[int, dict[str, Any]]:
        response = await self.http.get("/health")
        return response.status_code, response.json()


@pytest.fixture
async def fleet(sockets: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(stack, sockets)


async def test_requests_go_to_workers_of_their_model(fleet: Fleet, models: Path) -> None:
    await fleet.start(2, 2, models=(models,))
    red, blue = await fleet.pd(models / "red"), await fleet.pd(models / "blue")
    red_encoder, blue_encoder = await fleet.encoder(models / "red"), await fleet.encoder(models / "blue")
    for pd, encoder, name in ((red, red_encoder, "red"), (blue, blue_encoder, "blue")):
        answer = await fleet.chat(name, "x", png())
        assert (answer.status_code, answer.json()["model"]) == (200, name)
        assert len(pd.requests) == len(encoder.pictures) == 1
        assert encoder.peers[-1] == (pd.address,)
    keys = {encoder.pictures[0].request.content_key for encoder in (red_encoder, blue_encoder)}
    assert len(keys) == 2  # the same picture means something else to another model
    body = (await fleet.http.get("/v1/models")).json()
    assert [one["id"] for one in body["data"]] == ["blue", "red"]
    assert {one["status"] for one in body["models"]} == {"healthy"}
    view = (await fleet.http.get("/cluster")).json()
    assert {one["model"] for one in view["workers"]} == {"red", "blue"}


async def test_requests_that_can_name_no_model_go_to_that_of_the_flag(fleet: Fleet, models: Path) -> None:
    await fleet.start(2, 0, models=(models,), model=models / "blue", served_model_name="ours")
    await fleet.pd(models / "red")
    blue = await fleet.pd(models / "blue", name="theirs")
    assert (await fleet.http.post("/generate", json={"inputs": "x"})).status_code == 200
    assert len(blue.requests) == 1
    assert (await fleet.http.get("/get_model_name")).json() == {"model_name": "theirs"}


async def test_without_that_flag_they_need_a_single_model(fleet: Fleet, models: Path) -> None:
    await fleet.start(2, 0, models=(models,))
    await fleet.pd(models / "red")
    assert (await fleet.http.post("/generate", json={"inputs": "x"})).status_code == 200
    await fleet.pd(models / "blue")
    response = await fleet.http.post("/generate", json={"inputs": "x", "model": "red"})
    assert response.status_code == 400
    assert "--model" in response.json()["message"]


async def test_a_request_must_say_which_of_several_models_it_means(fleet: Fleet, models: Path) -> None:
    await fleet.start(2, 0, models=(models,))
    nothing_yet = await fleet.chat(None, "x")
    assert (nothing_yet.status_code, nothing_yet.json()["error"]["code"]) == (503, "no_worker")
    await fleet.pd(models / "red")
    assert (await fleet.chat(None, "x")).status_code == 200
    await fleet.pd(models / "blue")
    several = await fleet.chat(None, "x")
    assert (several.status_code, several.json()["error"]["param"]) == (400, "model")
    unknown = await fleet.chat("green", "x")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    for response in (several, unknown):
        assert "'blue', 'red'" in response.json()["message"]


async def test_a_model_that_lacks_a_role_is_degraded_and_its_requests_name_the_role(fleet: Fleet, models: Path) -> None:
    await fleet.start(2, 2, models=(models,))
    assert await fleet.health() == (503, {"message": "Error", "status": "unhealthy", "models": {}, "total": 0})
    await fleet.pd(models / "red")
    status, body = await fleet.health()
    assert (status, body["status"], body["missing"]) == (503, "unhealthy", {"red": ["encoder"]})
    await fleet.encoder(models / "red")
    await fleet.encoder(models / "blue")
    status, body = await fleet.health()
    assert (status, body["status"], body["missing"]) == (200, "degraded", {"blue": ["pd"]})
    assert body["models"] == {"red": "healthy", "blue": "degraded"}
    checked = await fleet.http.get("/check_health")
    assert (checked.status_code, checked.json()["status"]) == (200, "degraded")
    entries = {one["id"]: one for one in (await fleet.http.get("/v1/models")).json()["models"]}
    assert (entries["blue"]["status"], entries["blue"]["missing"]) == ("degraded", ["pd"])
    refused = await fleet.chat("blue", "x")
    assert refused.status_code == 503
    assert "No prefill-decode worker of blue" in refused.json()["message"]


async def test_a_model_whose_workers_all_left_is_degraded_and_not_unknown(fleet: Fleet, models: Path) -> None:
    await fleet.start(1, 0, models=(models,))
    pd = await fleet.pd(models / "red", "crimson")
    assert (await fleet.chat("crimson", "x")).status_code == 200
    await pd.stop()
    await eventually(lambda: not any(one.is_ready for one in fleet.service.pool.connections()))
    assert (await fleet.chat("crimson", "x")).status_code == 503
    assert (await fleet.health())[1]["models"] == {"crimson": "degraded"}


async def test_one_checkpoint_under_two_names_is_two_models(fleet: Fleet, models: Path) -> None:
    await fleet.start(2, 1, models=(models,))
    first, second = await fleet.pd(models / "red", "fast"), await fleet.pd(models / "red", "slow")
    encoder = await fleet.encoder(models / "red")
    for name in ("fast", "slow"):
        assert (await fleet.chat(name, "x", png())).json()["model"] == name
    assert (len(first.requests), len(second.requests), len(encoder.pictures)) == (1, 1, 2)
    assert [one["id"] for one in (await fleet.http.get("/v1/models")).json()["data"]] == ["fast", "slow"]


async def test_of_two_checkpoints_under_one_name_the_complete_one_answers(fleet: Fleet, models: Path) -> None:
    await fleet.start(2, 1, models=(models,))
    incomplete, complete = await fleet.pd(models / "red", "x"), await fleet.pd(models / "blue", "x")
    await fleet.encoder(models / "blue")
    for _ in range(4):
        assert (await fleet.chat("x", "hello")).status_code == 200
    assert (len(incomplete.requests), len(complete.requests)) == (0, 4)
    assert (await fleet.health())[0] == 200


async def test_workers_name_the_model_of_the_proxy_too(fleet: Fleet, models: Path) -> None:
    await fleet.start(2, 0, model=models / "red", served_model_name="ours")
    assert (await fleet.health())[1]["models"] == {"ours": "degraded"}
    await fleet.pd(models / "red", "theirs")
    assert (await fleet.health())[1]["models"] == {"theirs": "degraded"}
    await fleet.pd(models / "red")
    assert set((await fleet.health())[1]["models"]) == {"ours", "theirs"}


async def test_a_worker_of_an_unknown_checkpoint_is_told_what_is_missing_and_taken_once_it_is_there(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_connection, "REFUSED_RETRY_S", 0.05)
    monkeypatch.setattr(model_catalog, "SCAN_INTERVAL_S", 0.05)
    green = write_variant(tmp_path / "hidden" / "green", variant="green")
    root = tmp_path / "later"
    root.mkdir()
    await fleet.start(1, 0, models=(root,))
    pd = FakePrefillDecode(fleet.service.pool.connections()[0].member.address, fingerprint(green))
    pd.answer = (5,)
    await pd.start()
    fleet._stack.push_async_callback(pd.stop)
    wanted = f"serves model {pd.model}, which this proxy has no tokenizer for"
    await eventually(lambda: wanted in fleet.service.pool.connections()[0].problem)
    green.rename(root / "green")
    await eventually(lambda: [model.name for model in fleet.service.models()] == ["green"])
    assert (await fleet.chat("green", "x")).status_code == 200


# -- the catalog -------------------------------------------------------------------------------------------------------


def info(model: Path | str, name: str = "", role: WorkerRole = WorkerRole.PREFILL_DECODE) -> WorkerInfo:
    identity = fingerprint(model) if isinstance(model, Path) else model
    return WorkerInfo(role=role, address="a", incarnation="i", model=identity, dtype="f", served_model_name=name)


@pytest.fixture
def threads() -> Any:
    with ThreadPoolExecutor(1) as threads:
        yield threads


async def test_names_that_could_spoil_logs_are_refused(models: Path, threads: ThreadPoolExecutor) -> None:
    catalog = ModelCatalog(models / "red", "red", (), threads)
    assert catalog.reason_to_refuse(info(models / "red", "x" * MAX_NAME_CHARACTERS)) is None
    for name in ("x" * (MAX_NAME_CHARACTERS + 1), "a\nb", "\x1b[2J"):
        assert "served-model-name" in str(catalog.reason_to_refuse(info(models / "red", name)))


async def test_names_are_forgotten_in_time(models: Path, threads: ThreadPoolExecutor) -> None:
    now = 0.0
    catalog = ModelCatalog(models / "red", "red", (models,), threads, clock=lambda: now)
    red, blue = fingerprint(models / "red"), fingerprint(models / "blue")
    live = [info(models / "blue", "azure")]
    assert catalog.refs(live, []) == [ModelRef(red, "red"), ModelRef(blue, "azure")]
    now = MEMORY_S
    assert ModelRef(blue, "azure") in catalog.refs([], [])
    now = MEMORY_S + 1
    assert catalog.refs([], []) == [ModelRef(red, "red")]


async def test_a_broken_checkpoint_costs_its_workers_only(
    models: Path, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    broken = write_variant(tmp_path / "broken", variant="broken")
    (broken / "tokenizer.json").write_text("{}")
    catalog = ModelCatalog(None, "", (tmp_path, models), threads)
    for folder in (broken, models / "red"):
        assert catalog.reason_to_refuse(info(folder)) is None
    async with asyncio.timeout(20):
        while not (reason := catalog.reason_to_refuse(info(broken))):
            await asyncio.sleep(0.005)
        while not catalog.checkpoint(fingerprint(models / "red")):
            await asyncio.sleep(0.005)
    assert "of no use" in reason
    assert str(broken / "tokenizer.json") in reason
    await catalog.close()


async def test_a_value_of_the_wrong_kind_makes_a_checkpoint_of_no_use(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    odd = write_variant(tmp_path / "odd", variant="odd")
    (odd / "generation_config.json").write_text('{"temperature": "hot"}')
    catalog = ModelCatalog(None, "", (tmp_path,), threads)
    async with asyncio.timeout(20):
        while not (reason := catalog.reason_to_refuse(info(odd))):
            await asyncio.sleep(0.005)
    assert "generation_config.json" in reason
    await catalog.close()


async def test_a_folder_that_changes_is_read_again(
    models: Path,
    threads: ThreadPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(model_catalog, "SCAN_INTERVAL_S", 0.0)
    folder = tmp_path / "roots" / "green"
    folder.mkdir(parents=True)
    whole = write_variant(tmp_path / "green", variant="green")
    shutil.copy(whole / "config.json", folder)  # it is being copied while the proxy looks
    catalog = ModelCatalog(None, "", (folder.parent,), threads)

    async def taken(model: Path) -> None:
        async with asyncio.timeout(20):
            while catalog.reason_to_refuse(info(model)) or not catalog.checkpoint(fingerprint(model)):
                await asyncio.sleep(0.005)

    assert "no tokenizer for" in str(catalog.reason_to_refuse(info(whole)))
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    await taken(whole)
    shutil.copytree(models / "red", folder, dirs_exist_ok=True)  # the same folder, with another checkpoint
    await taken(models / "red")
    assert catalog.checkpoint(fingerprint(whole)) is not None
    shutil.rmtree(folder.parent)  # the disk is gone: what is loaded stays, and nothing breaks
    assert catalog.reason_to_refuse(info("unknown")) is not None
    async with asyncio.timeout(20):
        while "can't be read" not in caplog.text:
            await asyncio.sleep(0.005)
    assert catalog.reason_to_refuse(info(models / "red")) is None
    await catalog.close()


def test_what_the_proxy_is_given_must_be_there(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model or --models"):
        ProxyConfig()
    with pytest.raises(ConfigError, match=r"--models .* no such folder"):
        Service(ProxyConfig(models=(tmp_path / "nowhere",)))
    write_variant(tmp_path / "x")
    (tmp_path / "x" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Service(ProxyConfig(model=tmp_path / "x"))
