"""Scenarios of `POST /v1/generate`, and aliases of models: what operators set in the file of `--scenarios`.

The file is TOML; a scenario in it replaces the one of its name among those that come along (`scenarios.toml`):

    [scenarios.translate]
    system = "Translate the text of the user into English."
    user = "{inputs}"                      # default; has {inputs} once, for what the request brings
    parameters = { temperature = 0.2 }     # defaults of requests that do not say otherwise

    [aliases]
    qwen2 = "Qwen2-7B-Instruct"

`{inputs}` is replaced as text, once: braces in what users send mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from epd.errors import ConfigError
from epd.gateway_options import GatewayOptions, check_aliases
from proxy.text.user_text import Message

BASE = "base"
"""The scenario of requests that name none."""
INPUTS = "{inputs}"
_PLACEHOLDER = re.compile(r"\{\s*[A-Za-z_]\w*\s*\}")
_SHIPPED = "scenarios.toml"


class GenerateParameters(msgspec.Struct, kw_only=True):
    """Parameters of `POST /v1/generate`; None: the scenario's, or the default."""

    max_new_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=2**31 - 1)] | None, Meta(description="tokens to generate at most; default: 128")
    ] = None
    temperature: Annotated[Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 is greedy; default: 0.7")] = (
        None
    )
    top_p: Annotated[Annotated[float, Meta(gt=0, le=1)] | None, Meta(description="1 keeps all; default: 0.9")] = None
    do_sample: Annotated[bool | None, Meta(description="false is greedy; default: true")] = None
    stop: Annotated[
        list[str] | str | None, Meta(description="strings that end the text and are left out", examples=[["\n"]])
    ] = None
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None, Meta(description="0 or -1: all")] = None
    repetition_penalty: Annotated[Annotated[float, Meta(ge=0.01, le=100)] | None, Meta(description="1: none")] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
        Meta(description="the same seed and request give the same text"),
    ] = None

    def or_else(self, others: GenerateParameters) -> GenerateParameters:
        """These, and those of `others` where these say nothing."""
        ours = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return GenerateParameters(**(msgspec.structs.asdict(others) | ours))


DEFAULTS = GenerateParameters(max_new_tokens=128, temperature=0.7, top_p=0.9, do_sample=True, stop=[])


class ScenarioParameters(GenerateParameters, forbid_unknown_fields=True, kw_only=True):
    """The same in a file, where a name that means nothing is a mistake."""


class Scenario(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """How the prompt of a request is made."""

    system: str = ""
    """Instruction; empty: none."""
    user: str = INPUTS
    """The user's turn, with `{inputs}` in it once."""
    parameters: ScenarioParameters = msgspec.field(default_factory=ScenarioParameters)

    def messages(self, inputs: str) -> list[Message]:
        """The conversation that the chat template of the model is given."""
        before, _, after = self.user.partition(INPUTS)
        turn: Message = {"role": "user", "content": f"{before}{inputs}{after}"}
        return [{"role": "system", "content": self.system}, turn] if self.system else [turn]

    def in_one_turn(self, inputs: str) -> list[Message]:
        """The same for models whose template knows no system turn."""
        return Scenario(user=f"{self.system}\n\n{self.user}").messages(inputs)

    def problem(self) -> str | None:
        """What is wrong with it, in words; None: nothing."""
        if self.user.count(INPUTS) != 1:
            return f"user must have {INPUTS} once, where the text of the request goes"
        for field in ("system", "user"):
            unknown = [found for found in _PLACEHOLDER.findall(getattr(self, field)) if found != INPUTS]
            if unknown:
                return f"{field} has {unknown[0]}, which is no placeholder: there is {INPUTS} alone"
        if INPUTS in self.system:
            return f"system has {INPUTS}: the text of requests belongs into user, where it can't give orders"
        return None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    scenarios: dict[str, Scenario] = {}
    aliases: dict[str, str] = {}


@dataclass(frozen=True)
class GatewayConfig:
    """What the flags and the file say, checked."""

    scenarios: Mapping[str, Scenario]
    aliases: Mapping[str, str]
    """Alias → name of the model."""

    @classmethod
    def read(cls, options: GatewayOptions) -> GatewayConfig:
        """Read what comes along, then the file of the operators, which wins; over its aliases the flags win.

        Raises:
            ConfigError: the file can't be read, or something in it makes no sense.
        """
        shipped = _parse(files("proxy").joinpath(_SHIPPED).read_bytes(), _SHIPPED)
        if options.scenarios is None:
            return cls(shipped.scenarios, options.aliases())
        source = f"--scenarios {options.scenarios}"
        own = _parse(_read(options.scenarios, source), source)
        aliases = own.aliases | options.aliases()
        check_aliases(aliases, f"{source}, [aliases]")
        return cls(shipped.scenarios | own.scenarios, aliases)


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from error


def _parse(text: bytes, source: str) -> _File:
    try:
        found = msgspec.toml.decode(text, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: {error}") from error
    for name, scenario in found.scenarios.items():
        problem = scenario.problem() if name and name.isprintable() else "a scenario needs a name"
        if problem is not None:
            raise ConfigError(f"{source}, [scenarios.{name}]: {problem}")
    return found
