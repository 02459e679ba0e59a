"""What a request says about tools: which there are, which may be called, how many calls there may be."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Choice(Enum):
    """Who decides whether there are calls."""

    AUTO = auto()
    """The model."""
    REQUIRED = auto()
    """The client: at least one."""
    NAMED = auto()
    """The client: one call of the one function that may be called."""


@dataclass(frozen=True)
class Function:
    """A function that the client offers."""

    name: str
    field: str
    """Where it stands in the request, for errors: `tools[0].function`."""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; None: it takes none."""
    strict: bool = False
    """Arguments follow the schema, also where the model decides whether to call."""

    @property
    def tool(self) -> dict[str, Any]:
        """As chat templates take it: the whole object, in the order that models were trained on."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        # Many templates take them for granted.
        function["parameters"] = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """Tools of one request. There is none where no tool may be called: then the model does not hear of them."""

    shown: tuple[Function, ...]
    """Those that the prompt describes."""
    callable: tuple[Function, ...]
    """Those that may be called, where that is enforced."""
    choice: Choice = Choice.AUTO
    is_parallel: bool = True
    """Whether there may be several calls."""
    is_deprecated: bool = False
    """Whether the request says `functions`, and wants its answer so."""

    @property
    def max_calls(self) -> int | None:
        """After so many the answer ends; None: no limit."""
        return 1 if self.choice is Choice.NAMED or not self.is_parallel else None
