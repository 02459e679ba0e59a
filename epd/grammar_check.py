"""From a `Grammar` to what llguidance compiles, and whether it can: for the proxy at admission and for workers.

llguidance was chosen over xgrammar. Measured on one core with a byte-level vocabulary of 136,000 tokens, milliseconds:

    grammar               compile           mask of a step, mean (largest)
                          llguidance xgrammar    llguidance    xgrammar
    JSON schema, nested          0.8     1381    0.07 (1.2)    0.27 (6.1)
    any JSON object              0.4      102    0.07 (0.2)    0.04 (0.4)
    regular expression           0.7      8.5    0.05 (0.2)    0.04 (0.2)
    expressions (EBNF)           0.7      0.4    0.17 (0.2)    0.01 (0.0)

Compiling for a whole vocabulary is what a new schema costs, masks are small beside a forward pass in both. llguidance
is one wheel of 3 MB without dependencies, so that the proxy can check grammars without torch; xgrammar 0.2.8 requires
torch, transformers and triton. It says which keyword of a schema it does not know instead of dropping it, and limits
what a grammar may cost, per compilation and per step. Both had a release within weeks of the choice. Its price: a
vocabulary takes about 0.6 s and 100 MB when it is first read.

What a grammar may be: JSON schemas as https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md lists
them, regular expressions of the Rust crate `regex` without look-around and with ASCII digits, EBNF as Lark or,
recognised by `::=`, as GBNF.
"""

from __future__ import annotations

import json
import time
from functools import lru_cache

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from epd.errors import InvalidRequest
from epd.types import Grammar, GrammarKind

MAX_GRAMMAR_BYTES = 64 * 1024
"""Longer ones are refused."""
_MAX_TRIAL_S = 0.25
"""Processor time for compiling and for the first step, over the 256 bytes alone; sane grammars take milliseconds."""
_ALL_BYTES = (1 << 256) - 1
_MAX_REASON = 300
BLANKS = r"[\x20\x0A\x0D\x09]{0,40}"
"""Between JSON tokens. Bounded: a weak model can't fill its answer with blanks. Enough to indent deeply."""


def limits() -> llguidance.LLParserLimits:
    """What a grammar may cost, when it is compiled and in each step."""
    return llguidance.LLParserLimits(step_lexer_fuel=50_000, verbose_errors=False)


def validate(grammar: Grammar, *, param: str = "response_format") -> None:
    """Check at admission that workers can follow a grammar. May take a good part of a second: not on an event loop.

    Args:
        grammar: as the client gave it.
        param: the field of the request that an error names.

    Raises:
        InvalidRequest: it is malformed, not supported, can't be satisfied or costs too much, and why.
    """
    reason = _reason_against(grammar)
    if reason is not None:
        raise InvalidRequest(f"This {_NAMES[grammar.kind]} can't be followed: {reason}", param=param)


def llguidance_grammar(grammar: Grammar) -> str:
    """A grammar as `llguidance.LLMatcher` takes it.

    Raises:
        ValueError: it is malformed. What only the compiler sees is not found here.
    """
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return _json('{"type": "object"}')
        case GrammarKind.JSON_SCHEMA:
            return _json(grammar.text)
        case GrammarKind.REGEX:
            # Digits are ASCII, as in JSON schemas. The group keeps an empty one from reading as a comment.
            return llguidance.LLMatcher.grammar_from_lark(f"start: /(?:{llguidance.regex_to_lark(grammar.text, 'd')})/")
        case GrammarKind.CHOICE:
            return llguidance.LLMatcher.grammar_from_lark(_choice(grammar.text))
        case GrammarKind.EBNF:
            return llguidance.LLMatcher.grammar_from_lark(_lark(grammar.text))


def explain(error: str) -> str:
    """What the library says is wrong, on one line that a client can read."""
    words = " ".join(error.replace("<non-verbose/>", "").split())
    if "NoExtension" in words:
        words = "no text satisfies it"
    return words if len(words) <= _MAX_REASON else words[:_MAX_REASON] + " …"


_NAMES = {
    GrammarKind.JSON_OBJECT: "JSON format",
    GrammarKind.JSON_SCHEMA: "JSON schema",
    GrammarKind.REGEX: "regular expression",
    GrammarKind.CHOICE: "choice",
    GrammarKind.EBNF: "grammar",
}


@lru_cache(maxsize=256)
def _reason_against(grammar: Grammar) -> str | None:
    size = len(grammar.text.encode())
    if size > MAX_GRAMMAR_BYTES:
        return f"it has {size} bytes, and at most {MAX_GRAMMAR_BYTES} are allowed."
    try:
        source = llguidance_grammar(grammar)
    except ValueError as error:
        return explain(str(error))
    return _try_out(source)


def _try_out(source: str) -> str | None:
    """Compile for a vocabulary of bytes and take the first steps: finds what can't be satisfied and what costs much."""
    start = time.thread_time()
    matcher = llguidance.LLMatcher(_bytes_tokenizer(), source, log_level=0, limits=limits())
    if not matcher.is_error():
        first = int.from_bytes(matcher.compute_bitmask(), "little") & _ALL_BYTES
        # Behind the brace of an object, all its optional properties may come at once.
        if first and not matcher.is_error():
            matcher.consume_token(first.bit_length() - 1)
    if time.thread_time() - start > _MAX_TRIAL_S:
        return "it is too complex. Smaller repetition counts or fewer alternatives may help."
    return explain(matcher.get_error()) if matcher.is_error() else None


@lru_cache(maxsize=1)
def _bytes_tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


def _json(schema: str) -> str:
    # As overrides: a schema can carry options of its own.
    return llguidance.LLMatcher.grammar_from_json_schema(
        schema, overrides={"lenient": False, "whitespace_pattern": BLANKS}
    )


def _choice(text: str) -> str:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("want a list of one or more strings")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _lark(text: str) -> str:
    if "::=" not in text:
        return text
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # the converter raises bare Exception, and RecursionError on deep nesting
        raise ValueError(str(error)) from error
