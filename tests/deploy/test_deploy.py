"""What deploy/ says must fit the program: flags exist, files and names that are referred to exist, limits fit together.

Schemas of the files are checked by `make check`. No container engine is needed here.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from epd.cli import make_parser
from epd.config import ProxyConfig, WorkerConfig
from metastore.config import MetastoreConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
ROOT = DEPLOY.parent
COMPOSE_FILES = [DEPLOY / "docker-compose.yml", *sorted((DEPLOY / "multi-node").glob("*.yml"))]
BASE = DEPLOY / "kubernetes" / "base"
OVERLAYS = sorted((DEPLOY / "kubernetes" / "overlays").iterdir())
VARIABLES = {
    "EPD_NODE_IP": "10.0.0.2",
    "EPD_REDIS_URL": "redis://:secret@10.0.0.1:6379/0",
    "EPD_REDIS_PASSWORD": "secret",
    "EPD_KEYS": "/etc/epd/cluster.keys",
}


def interpolate(text: str, variables: dict[str, str]) -> str:
    """Compose's `${NAME}`, `${NAME:-default}` and `${NAME:?what it is}`."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match["name"], match["kind"], match["rest"]
        if variables.get(name):
            return variables[name]
        assert kind == ":-", f"{name} has no default, and no node sets it ({rest})"
        return str(rest)

    return re.sub(r"\$\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<rest>[^}]*))?\}", value, text)


def services(path: Path) -> dict[str, Any]:
    """The services of a compose file as the engine sees them. Keys merged by `<<` are resolved."""
    document = yaml.safe_load(interpolate(path.read_text(), VARIABLES))
    found: dict[str, Any] = document["services"]
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours in deploy/, with where it stands."""
    for path in COMPOSE_FILES:
        for name, service in services(path).items():
            health = service.get("healthcheck", {}).get("test", [])
            for words in (service.get("command", []), health[2:] if health[1:2] == ["epd"] else []):
                if words and words[0] in ("proxy", "encoder", "pd", "ping"):
                    yield f"{path.name}: {name}", words
            if "entrypoint" in service:
                yield f"{path.name}: {name}", shlex.split(service["entrypoint"][-1].partition("|| epd ")[2])
    values = dict(line.split("=", 1) for line in kustomization(BASE)["configMapGenerator"][0]["literals"])
    values["POD_IP"] = "10.0.0.7"
    for deployment in kind("Deployment"):
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            where = f"kubernetes: {deployment['metadata']['name']}"
            if container["name"] in ("proxy", "worker"):
                yield where, [re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], word) for word in container["args"]]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                words = container.get(probe, {}).get("exec", {}).get("command", [])
                if words[:1] == ["sh"]:
                    yield where, shlex.split(words[-1].replace("$POD_IP", values["POD_IP"]))[1:]


def kustomization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return found


def objects(folder: Path = BASE) -> list[dict[str, Any]]:
    return [
        document
        for name in kustomization(folder)["resources"]
        if (folder / name).is_file()
        for document in yaml.safe_load_all((folder / name).read_text())
    ]


def kind(name: str) -> list[dict[str, Any]]:
    return [one for one in objects() if one["kind"] == name]


@pytest.mark.parametrize(("where", "words"), list(commands()))
def test_command_lines_are_understood(where: str, words: list[str]) -> None:
    parsed = vars(make_parser().parse_args(words))
    if words[0] in ("proxy", "encoder", "pd"):
        MetastoreConfig.from_json(parsed["metastore_client_config"])
        assert parsed["cluster_keys"], where


def test_there_are_command_lines_of_every_kind() -> None:
    assert {words[0] for _, words in commands()} == {"proxy", "encoder", "pd", "ping", "keys"}


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_names_what_is_there(path: Path) -> None:
    document = yaml.safe_load(interpolate(path.read_text(), VARIABLES))
    for service in document["services"].values():
        assert set(service.get("depends_on", {})) <= set(document["services"])
        assert set(service.get("networks", [])) <= set(document.get("networks", {}))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith((".", "/")):
                assert source in ("./checkpoints", VARIABLES["EPD_KEYS"]) or (DEPLOY / source).exists()
            else:
                assert source in document.get("volumes", {})
        if "build" in service:
            target = service["build"]["target"]
            assert re.search(rf"^FROM .+ AS {target}$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)


def test_variables_without_a_default_are_in_the_example() -> None:
    example = {line.split("=")[0] for line in (DEPLOY / "multi-node" / ".env.example").read_text().splitlines()}
    for path in (DEPLOY / "multi-node").glob("*.yml"):
        assert set(re.findall(r"\$\{(\w+):\?", path.read_text())) <= example


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_has_one_service_of_each_role(profile: str) -> None:
    roles = [
        service["command"][0]
        for service in services(DEPLOY / "docker-compose.yml").values()
        if profile in service.get("profiles", [profile]) and "command" in service
    ]
    assert sorted(role for role in roles if role in ("encoder", "pd", "proxy")) == ["encoder", "pd", "proxy"]


def test_containers_outlive_their_drain_limit() -> None:
    for path in COMPOSE_FILES:
        for service in services(path).values():
            if service.get("command", [""])[0] in ("proxy", "encoder", "pd"):
                assert int(service["stop_grace_period"].removesuffix("s")) > WorkerConfig.drain_timeout
    for deployment in kind("Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        if spec["containers"][0]["name"] in ("proxy", "worker"):
            assert spec["terminationGracePeriodSeconds"] > WorkerConfig.drain_timeout


def test_the_images_have_all_sources() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert f"!{source.split('/')[0]}" in ignored
    assert re.search(r"^EXPOSE 5580", text, re.MULTILINE)
    assert ProxyConfig.port == 5580


# -- Kubernetes ------------------------------------------------------------------------------------------------------


def test_every_file_of_the_base_is_listed() -> None:
    assert {path.name for path in BASE.glob("*.yaml")} == {"kustomization.yaml", *kustomization(BASE)["resources"]}


def test_selectors_and_targets_are_there() -> None:
    pods = [one["spec"]["template"] for one in kind("Deployment")]
    names = {one["metadata"]["name"] for one in kind("Deployment")}
    shared = kustomization(BASE)["labels"][0]["pairs"]

    def matched(selector: dict[str, str]) -> bool:
        return any((pod["metadata"]["labels"] | shared).items() >= selector.items() for pod in pods)

    for one in kind("Deployment"):
        assert matched(one["spec"]["selector"]["matchLabels"])
    for one in kind("Service"):
        assert matched(one["spec"]["selector"])
    for one in kind("PodDisruptionBudget"):
        assert matched(one["spec"]["selector"]["matchLabels"])
    for one in kind("NetworkPolicy"):
        assert matched(one["spec"]["podSelector"]["matchLabels"])
    for one in kind("HorizontalPodAutoscaler"):
        assert one["spec"]["scaleTargetRef"]["name"] in names


def test_redis_is_found_by_the_name_of_its_service() -> None:
    values = dict(line.split("=", 1) for line in kustomization(BASE)["configMapGenerator"][0]["literals"])
    address = MetastoreConfig.from_json(values["EPD_METASTORE"]).address
    assert any(f"//{service['metadata']['name']}:6379" in address for service in kind("Service"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlays_fit_the_base(overlay: Path) -> None:
    content = kustomization(overlay)
    for resource in content["resources"]:
        assert (overlay / resource).exists()
    images = {c["image"] for one in kind("Deployment") for c in one["spec"]["template"]["spec"]["containers"]}
    assert {image["name"] for image in content["images"]} <= images
    for patch in content.get("patches", []):
        chosen = [one for one in kind("Deployment") if re.fullmatch(patch["target"]["name"], one["metadata"]["name"])]
        assert chosen
        for deployment in chosen:
            apply_patch(copy.deepcopy(deployment), yaml.safe_load((overlay / patch["path"]).read_text()))


def apply_patch(document: Any, operations: list[dict[str, Any]]) -> None:
    """RFC 6902, `add` and `replace`. Raises KeyError or IndexError where a path leads nowhere."""
    for operation in operations:
        *path, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
        place = document
        for part in path:
            place = place[int(part) if isinstance(place, list) else part]
        if operation["op"] == "replace":
            assert last in place
        if last == "-":
            place.append(operation["value"])
        else:
            place[last] = operation["value"]
