from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from epd.cli import main
from epd.errors import ConfigError
from epd.keys import load_keys, new_key_file


def test_a_new_file_is_private_says_what_it_is_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "cluster.keys"
    assert main(["keys", "new", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("# Keys of one epd cluster")
    keys = load_keys(path)
    assert (len(keys.public), len(keys.secret)) == (40, 40)
    assert keys.secret.decode() not in repr(keys)


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cluster.keys"
    new_key_file(path)
    before = path.read_bytes()
    assert main(["keys", "new", str(path)]) == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o644])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "cluster.keys"
    new_key_file(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_keys(path)


def test_the_group_may_read_as_secrets_of_containers_are_mounted(tmp_path: Path) -> None:
    path = tmp_path / "cluster.keys"
    new_key_file(path)
    path.chmod(0o440)
    load_keys(path)


def swapped(text: str) -> str:
    return text.replace("public", "x").replace("secret", "public").replace("x-key", "secret-key")


@pytest.mark.parametrize(
    "change",
    [lambda text: "", lambda text: text[:-8], lambda text: text.replace("secret-key ", "secret-key ~"), swapped],
)
def test_what_is_no_key_pair_is_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "cluster.keys"
    new_key_file(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match="holds no key pair"):
        load_keys(path)


def test_a_missing_file_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="epd keys new"):
        load_keys(tmp_path / "nothing")
