from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from epd.cli import main, make_parser
from epd.config import EncoderConfig, PrefillDecodeConfig, ProxyConfig
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError
from epd.flags import add_flags, read_flags
from epd.up_config import UpConfig

MODEL = ["--model", str(CHECKPOINT_DIR)]


def parse(config: type[Any], *words: str) -> Any:
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    return read_flags(config, parser.parse_args([*MODEL, *words]))


def test_defaults_are_those_of_the_class() -> None:
    assert parse(ProxyConfig) == ProxyConfig(model=CHECKPOINT_DIR)
    assert parse(EncoderConfig, "--worker-addr", "/tmp/e") == EncoderConfig(model=CHECKPOINT_DIR, worker_addr="/tmp/e")


@pytest.mark.parametrize("words", [["a", "b", "c"], ["a,b,c"], ["a,b", "c"], ["a,", "b,c"]])
def test_lists_take_words_and_commas(words: list[str]) -> None:
    assert parse(ProxyConfig, "--api-key", *words).api_key == ("a", "b", "c")


def test_values_have_the_type_of_the_field() -> None:
    config = parse(
        PrefillDecodeConfig, "--worker-addr", "h:1", "--max-num-seqs", "7", "--gpu-memory-utilization", "0.5"
    )
    assert (config.max_num_seqs, config.gpu_memory_utilization, config.model) == (7, 0.5, CHECKPOINT_DIR)


@pytest.mark.parametrize(
    ("words", "value"), [([], True), (["--enable-prefix-caching"], True), (["--no-enable-prefix-caching"], False)]
)
def test_truth_values_have_two_flags(words: list[str], value: bool) -> None:
    config = parse(PrefillDecodeConfig, "--worker-addr", "h:1", *words)
    assert config.enable_prefix_caching is value


def test_a_model_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model .* no config\.json"):
        ProxyConfig(model=tmp_path)


IMPOSSIBLE = ("nan", "inf", "-1", "9" * 30)


def number_flags(parser: argparse.ArgumentParser, *command: str) -> list[tuple[str, ...]]:
    """Each flag for a number of each command: the command with what it needs, and the flag."""
    below: list[tuple[str, ...]] = []
    flags, needed = [], list(command)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                below += number_flags(one, *command, name)
        elif action.required and action.dest != "command":
            needed += [action.option_strings[0], str(CHECKPOINT_DIR)] if action.option_strings else ["new"]
        elif action.metavar in ("N", "X", "S", "SECONDS"):
            flags.append(action.option_strings[0])
    return below + [(*needed, flag) for flag in flags]


@pytest.mark.parametrize("value", IMPOSSIBLE)
@pytest.mark.parametrize("words", number_flags(make_parser()), ids=" ".join)
def test_a_number_that_can_not_work_is_refused_by_its_flag(
    words: tuple[str, ...], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is started."""
    flag = words[-1]
    assert main([*words[:-1], f"{flag}={value}"]) == 2
    assert re.match(rf"epd: {flag} \S+: want (at|a|a whole) ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("config", "words", "told"),
    [
        (EncoderConfig, ["--nice", "99"], "want at most 19"),
        (EncoderConfig, ["--threads", "0"], "want at least 1"),
        (EncoderConfig, ["--threads", "1e20"], "want a whole number"),
        (EncoderConfig, ["--embedding-cache-bytes", str(10**16)], "want at most 1000000000000000"),
        (PrefillDecodeConfig, ["--gpu-memory-utilization", "1.5"], "want at most 1"),
        (PrefillDecodeConfig, ["--block-size", "0"], "want at least 1"),
        (PrefillDecodeConfig, ["--tp", "100000"], "want at most"),
        (UpConfig, ["--pds", "0"], "want at least 1"),
        (UpConfig, ["--request-timeout", "soon"], "want a number"),
        (UpConfig, ["--proxies", "0"], "want at least 1"),
        (UpConfig, ["--target-step-ms", "nan"], "want at least 0"),
    ],
)
def test_what_is_wrong_with_a_number_is_told(config: type[Any], words: list[str], told: str) -> None:
    more = [] if config is UpConfig else ["--worker-addr", "/tmp/w"]
    with pytest.raises(ConfigError, match=f"^{' '.join(words)}: {told}"):
        parse(config, *more, *words)


@pytest.mark.parametrize("config", [ProxyConfig, EncoderConfig, PrefillDecodeConfig, UpConfig])
def test_every_number_has_a_minimum(config: type[Any]) -> None:
    kinds = typing.get_type_hints(config)
    numbers = [one for one in dataclasses.fields(config) if kinds[one.name] in (int, float, int | None, float | None)]
    assert len(numbers) > 5
    assert [one.name for one in numbers if "minimum" not in one.metadata] == []


@pytest.mark.parametrize("name", ["missing", "x" * 300])
@pytest.mark.parametrize("config", [ProxyConfig, UpConfig])
def test_a_folder_of_pictures_must_be_there(config: type[Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--allowed-local-media-path .*/{name}: there is no such folder"):
        parse(config, "--allowed-local-media-path", str(tmp_path / name))


@pytest.mark.parametrize(
    "words",
    [["--worker-addr", "nonsense"], ["--proxy-addr", "/tmp/p", "nonsense"], ["--share-cores", "/nowhere/turns"]],
)
def test_a_worker_knows_wrong_addresses_before_its_model_is_loaded(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=words[0]):
        parse(EncoderConfig, "--worker-addr", "/tmp/e", *words)


@pytest.mark.parametrize("flag", ["proxy-addr", "encode-addr-list", "pd-addr-list"])
def test_a_proxy_names_the_flag_with_a_wrong_address(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag}: address"):
        parse(ProxyConfig, f"--{flag}", "nonsense")


@pytest.mark.parametrize("words", [["--port", "0"], ["--port", "65535", "--proxies", "2"], ["--port", "-1"]])
def test_the_ports_of_a_cluster_are_known_beforehand(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--port"):
        parse(UpConfig, *words)


@pytest.mark.parametrize("value", ["", ","])
@pytest.mark.parametrize("flag", ["api-key", "allowed-origins", "encode-addr-list"])
def test_a_list_of_nothing_is_refused(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag}: it is empty"):
        parse(ProxyConfig, f"--{flag}", value)


@pytest.mark.parametrize(
    "flag", ["admin-key", "host", "allowed-local-media-path", "cluster-keys", "models", "served-model-name"]
)
def test_an_empty_value_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(ProxyConfig, f"--{flag}", "")
    assert exit_info.value.code == 2
    assert f"--{flag}: it is empty" in capsys.readouterr().err
    parse(ProxyConfig, "--root-path", "", "--allowed-origins", "[]")


@pytest.mark.parametrize("key", ["", " ", "two words"])
def test_an_admin_key_that_anybody_might_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="--admin-key"):
        ProxyConfig(model=CHECKPOINT_DIR, admin_key=key)


@pytest.mark.parametrize("command", ["proxy", "encoder", "pd", "up", "chat", "demo"])
def test_help_explains_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert len(flags) == len(set(flags)) > 0


def test_a_wrong_model_folder_exits_with_2_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["proxy", "--model", str(tmp_path)]) == 2
    assert "--model" in capsys.readouterr().err


def test_chat_says_what_to_do_when_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9/v1", "hello?"]) == 2
    assert "epd up" in capsys.readouterr().err


def test_chat_names_a_picture_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    assert main(["chat", "--model", "m", "--image", str(missing), "what?"]) == 2
    assert str(missing) in capsys.readouterr().err
