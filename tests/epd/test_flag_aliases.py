"""Command lines as other servers' documents print them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from epd.cli import main, make_parser
from epd.config import EncoderConfig, PrefillDecodeConfig, ProxyConfig
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError
from epd.flag_aliases import ALWAYS_SO, RENAMED, REPLACED, translate
from epd.flags import read_flags
from epd.up_config import UpConfig

DIR = str(CHECKPOINT_DIR)
CONFIGS: dict[str, Any] = {
    "proxy": ProxyConfig,
    "up": UpConfig,
    "pd": PrefillDecodeConfig,
    "encoder": EncoderConfig,
}
LM_SERVICE = ["--model", DIR, "--proxy-addr", "/tmp/proxy", "--port", "5580", "--host", "0.0.0.0"]


def read(*words: str) -> Any:
    parsed = make_parser().parse_args(translate(words))
    return read_flags(CONFIGS[words[0]], parsed)


def test_lmdeploy() -> None:
    config = read("up", DIR, "127.0.0.1", "23333", "--instance_num", "32", "--tp", "1")
    assert (config.model, config.host, config.port) == (CHECKPOINT_DIR, "127.0.0.1", 23333)
    assert (config.max_num_seqs, config.tp) == (32, 1)
    assert read("up", DIR, "--server-port", "7").port == 7
    assert read("up", "--pds", "2").pds == 2


def test_lightllm() -> None:
    config = read("up", "--model_dir", DIR, "--port", "8088", "--tp", "1", "--max_model_len=100")
    assert (config.model, config.port, config.tp, config.max_model_len) == (CHECKPOINT_DIR, 8088, 1, 100)
    config = read("up", "--model_dir", DIR, "--port", "8088", "--tp", "1", "--tool_call_parser", "qwen25")
    assert config.tool_call_parser == "qwen25"
    assert read("proxy", "--model_dir", DIR, "--server_name", "::1", "--server_port=9").host == "::1"


def test_lm_service() -> None:
    lists = ["--encode-addr-list", "/tmp/encoder_0", "--pd-addr-list", "/tmp/prefill_decode_0"]
    config = read("proxy", *LM_SERVICE, *lists, "--allowed-local-media-path", DIR)
    assert (config.encode_addr_list, config.pd_addr_list) == (("/tmp/encoder_0",), ("/tmp/prefill_decode_0",))
    assert config == read("proxy", *LM_SERVICE, *lists, "--allowed_local_media_path", DIR, "--enable-health-monitor")
    assert read("proxy", *LM_SERVICE, *lists, "--transfer-protocol", "ipc").transfer_protocol == "ipc"
    with pytest.raises(ConfigError, match=r"--transfer-protocol tcp: .*ipc:///tmp/encoder_0"):
        read("proxy", *LM_SERVICE, *lists, "--transfer-protocol", "tcp")


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["proxy", "--p-addr-list", "/tmp/p"], "--pd-addr-list"),
        (["proxy", "--d_addr_list=/tmp/d"], "--pd-addr-list"),
        (["proxy", "--tp", "2"], "epd up"),
        (["proxy", "--instance_num", "2"], "--max-num-seqs"),
        (["up", "--pd-addr-list", "/tmp/d"], "--pds"),
        (["pd", "--trust_remote_code"], "transformers"),
    ],
)
def test_what_makes_no_sense_says_what_does(words: list[str], instead: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert words[1].partition("=")[0] in shown
    assert instead in shown


def test_words_that_are_no_flags_stay_as_they_are() -> None:
    words = ["chat", "--max_tokens", "5", "a_b", "--url=http://my_host/v1", "--", "--what_is this"]
    assert translate(words) == ["chat", "--max-tokens", "5", "a_b", "--url=http://my_host/v1", "--", "--what_is this"]
    assert translate([]) == []
    assert translate(["--version"]) == ["--version"]


def test_aliases_lead_to_flags_that_there_are_and_hide_none() -> None:
    commands = next(one for one in make_parser()._actions if isinstance(one, argparse._SubParsersAction)).choices
    for command in RENAMED.keys() | ALWAYS_SO.keys() | REPLACED.keys():
        flags = {flag for action in commands[command]._actions for flag in action.option_strings}
        assert set(RENAMED[command].values()) <= flags
        assert not flags & {*RENAMED[command], *ALWAYS_SO.get(command, ()), *REPLACED[command]}
