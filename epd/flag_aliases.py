"""Flags as other servers call them: what the documents of LMDeploy, LightLLM, LM-Service and vLLM show works here.

Every flag may be written with underscores. Some have another name here; some ask for what is always so, and are
dropped; some make no sense here, and are refused with what to use instead. `epd up DIR [HOST [PORT]]` works too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from epd.errors import ConfigError

_SERVER = {"--model-dir": "--model", "--server-name": "--host", "--server-port": "--port"}
_MODEL = {"--model-dir": "--model", "--tensor-parallel-size": "--tp", "--instance-num": "--max-num-seqs"}
_NAME = {"--model-name": "--served-model-name", "--uvicorn-log-level": "--log-level"}

RENAMED: Mapping[str, Mapping[str, str]] = {
    "proxy": _SERVER | _NAME,
    "up": _SERVER | _MODEL | _NAME,
    "pd": _MODEL | _NAME,
    "encoder": {"--model-dir": "--model"} | _NAME,
}
"""Command → flag of others → ours."""

ALWAYS_SO: Mapping[str, frozenset[str]] = {
    "proxy": frozenset({"--enable-health-monitor", "--enable-auto-tool-choice"}),
    "up": frozenset({"--enable-health-monitor", "--enable-auto-tool-choice"}),
}
"""Command → flags, without a value, that are dropped."""

_NO_SPLIT = "prefill and decode run in one worker here: start `epd pd` and name it in --pd-addr-list"
_NO_MODEL = "a proxy computes nothing: give it to `epd pd`, or to `epd up`, which starts everything"
_NO_CODE = "code that comes with a checkpoint is never run here; the model's class must be one of transformers' own"

REPLACED: Mapping[str, Mapping[str, str]] = {
    "proxy": {
        "--p-addr-list": _NO_SPLIT,
        "--d-addr-list": _NO_SPLIT,
        "--tp": _NO_MODEL,
        "--tensor-parallel-size": _NO_MODEL,
        "--instance-num": "requests at once are --max-num-seqs of `epd pd`, and --max-concurrent-requests here",
        "--no-enable-health-monitor": "workers are always watched; what is asked of them is a ping twice a second",
        "--trust-remote-code": _NO_CODE,
    },
    "up": {
        "--p-addr-list": _NO_SPLIT,
        "--d-addr-list": _NO_SPLIT,
        "--encode-addr-list": "`epd up` starts its own workers (--encoders N); lists are for `epd proxy`",
        "--pd-addr-list": "`epd up` starts its own workers (--pds N); lists are for `epd proxy`",
        "--no-enable-health-monitor": "workers are always watched; what is asked of them is a ping twice a second",
        "--trust-remote-code": _NO_CODE,
    },
    "pd": {"--trust-remote-code": _NO_CODE},
    "encoder": {"--trust-remote-code": _NO_CODE},
}
"""Command → flag of others → what to do instead."""

_POSITIONAL = ("--model", "--host", "--port")


def translate(words: Sequence[str]) -> list[str]:
    """The words of a command line in our flags.

    Args:
        words: behind `epd`, the command first.

    Raises:
        ConfigError: a flag that has no meaning here; says what to use instead.
    """
    if not words or words[0].startswith("-"):
        return list(words)
    command = words[0]
    translated = [command]
    for index, word in enumerate(words[1:], 1):
        if word == "--":
            return translated + list(words[index:])
        if word.startswith("--"):
            translated += _flag(command, word)
        else:
            translated.append(word)
    return _named(translated) if command == "up" else translated


def _flag(command: str, word: str) -> list[str]:
    written, equals, value = word.partition("=")
    name = "--" + written[2:].replace("_", "-")
    reason = REPLACED.get(command, {}).get(name)
    if reason is not None:
        raise ConfigError(f"{written}: {reason}")
    if name in ALWAYS_SO.get(command, ()) and not equals:
        return []
    return [RENAMED.get(command, {}).get(name, name) + equals + value]


def _named(words: list[str]) -> list[str]:
    """The first words after the command, up to three, as the flags that they stand for."""
    named = words[:1]
    for index, word in enumerate(words[1:4]):
        if word.startswith("-"):
            break
        named += [_POSITIONAL[index], word]
    return named + words[1 + (len(named) - 1) // 2 :]
