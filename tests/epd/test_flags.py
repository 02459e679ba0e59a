from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from epd.cli import main
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


@pytest.mark.parametrize("words", [["--pds", "0"], ["--encoders", "-1"], ["--proxies", "0"]])
def test_a_cluster_needs_its_parts(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--pds"):
        parse(UpConfig, *words)


@pytest.mark.parametrize(
    "words",
    [["--threads", "0"], ["--preprocess-threads", "0"], ["--embedding-cache-bytes", "-1"], ["--drain-timeout", "nan"]],
)
def test_numbers_that_can_not_work_are_refused_by_name(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=words[0]):
        parse(EncoderConfig, "--worker-addr", "/tmp/e", *words)


@pytest.mark.parametrize(
    "flag", ["max-num-seqs", "max-num-batched-tokens", "max-model-len", "kv-cache-memory-bytes", "block-size"]
)
def test_sizes_of_an_engine_are_refused_by_their_flags(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} 0: want at least 1"):
        parse(PrefillDecodeConfig, "--worker-addr", "/tmp/p", f"--{flag}", "0")


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
