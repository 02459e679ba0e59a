"""Families of models by what they write to call a tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from epd.config import TOOL_CALL_PARSERS
from proxy.tools.parsers import CallParser, LlamaParser, MistralParser, QwenParser


@dataclass(frozen=True)
class Family:
    """What models of one kind write."""

    name: str
    new_parser: Callable[[int | None], CallParser]
    """Makes a parser that reads so many calls at most."""
    markers: tuple[str, ...]
    """Literals that the parser looks for. Where they are special tokens, it must see them."""
    has_short_ids: bool = False
    """Whether ids of calls are nine letters and digits."""


QWEN25 = Family("qwen25", QwenParser, ("<tool_call>", "</tool_call>"))
LLAMA3 = Family("llama3", LlamaParser, ("<|python_tag|>",))
MISTRAL = Family("mistral", MistralParser, ("[TOOL_CALLS]",), has_short_ids=True)
MISTRAL_V11 = Family("mistral", MistralParser, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), has_short_ids=True)

_FAMILIES = {
    "qwen25": QWEN25,
    "qwen": QWEN25,
    "hermes": QWEN25,
    "llama3": LLAMA3,
    "llama3_json": LLAMA3,
    "mistral": MISTRAL,
}
assert {"auto", *_FAMILIES} == set(TOOL_CALL_PARSERS)


def family_of(flag: str, template: str, *, has_tools: bool) -> Family | None:
    """The family of a model; None: it is none that is known.

    Args:
        flag: what `--tool-call-parser` says.
        template: source of the chat template.
        has_tools: whether the template has a place for tools. Where it has none, prompts ask for the format of qwen25
            in words (see `prompt.py`), so that is what comes, whatever the flag says of other models.
    """
    if not has_tools:
        return QWEN25
    known = _FAMILIES.get(flag) or _recognised(template)
    return MISTRAL_V11 if known is MISTRAL and "[ARGS]" in template else known


def _recognised(template: str) -> Family | None:
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:  # XML: other models
        return QWEN25
    if "<|python_tag|>" in template or "ipython" in template:
        return LLAMA3
    return None
