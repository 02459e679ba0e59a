"""The unified gateway: other names of models, scenarios of `POST /v1/generate`, and how long that may take.

One set of fields for `epd proxy` and `epd up`, which passes them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from epd.errors import ConfigError
from epd.options import option

_GROUP = "unified gateway"
COVERED_TOKENS = 128
"""Tokens of an answer that `--generate-timeout` is meant for; it is what `max_new_tokens` defaults to."""


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """Fields of the flags about the gateway; `check_gateway` is for the constructors of the classes that have them."""

    model_alias: tuple[str, ...] = option(
        (),
        "further names of models in the API (qwen2=Qwen2-7B-Instruct): on all endpoints, and listed in /v1/models",
        metavar="NAME=MODEL",
        group=_GROUP,
    )
    scenarios: Path | None = option(
        None,
        "TOML file with prompt templates of POST /v1/generate ([scenarios.NAME]), which add to those that come along "
        "or replace them, and with further names of models ([aliases])",
        metavar="FILE",
        group=_GROUP,
    )
    generate_timeout: float = option(
        60.0,
        f"seconds that POST /v1/generate may take for up to {COVERED_TOKENS} tokens; never more than --request-timeout",
        minimum=0.001,
        group=_GROUP,
    )
    generate_timeout_per_token: float = option(
        0.25,
        f"seconds more for each token that max_new_tokens asks for beyond {COVERED_TOKENS}",
        minimum=0,
        group=_GROUP,
    )

    def check_gateway(self) -> None:
        """Raises ConfigError: an alias is malformed. Files are read by the proxy."""
        self.aliases()

    def aliases(self) -> dict[str, str]:
        """Alias → model, of the flags alone.

        Raises:
            ConfigError: one is malformed.
        """
        found: dict[str, str] = {}
        for word in self.model_alias:
            name, _, model = word.partition("=")
            if found.get(name, model) != model:
                raise ConfigError(f"--model-alias {word}: {name} stands for {found[name]} already")
            found[name] = model
        check_aliases(found, "--model-alias")
        return found

    def generate_timeout_s(self, max_new_tokens: int) -> float:
        """Seconds for an answer of so many tokens, before the bound of `--request-timeout`."""
        beyond = max(0, max_new_tokens - COVERED_TOKENS)
        return self.generate_timeout + self.generate_timeout_per_token * beyond


def check_aliases(aliases: Mapping[str, str], source: str) -> None:
    """Raises ConfigError: a name or a model is empty or can't be printed, or an alias stands for an alias."""
    for name, model in aliases.items():
        if not name or not model or not (name + model).isprintable():
            raise ConfigError(f"{source} {name}={model}: want NAME=MODEL, both not empty")
        if model in aliases:
            raise ConfigError(f"{source} {name}={model}: {model} is an alias itself; name the model")
