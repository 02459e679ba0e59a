"""Tokens to content and tool calls: special tokens that only the parser sees, log probabilities, early ends."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tokenizers import AddedToken

from epd.types import FinishReason, TokenLogprobs
from proxy.dispatch.work import Update
from proxy.text.answer import Answer, TextOptions
from proxy.text.tokenizer import Tokenizer
from proxy.tools.parsers import MistralParser, QwenParser
from proxy.tools.reader import CallOptions

TEXT = 'Look: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def tell(answer: Answer, token_ids: list[int], reason: FinishReason = FinishReason.STOP, size: int = 1) -> str:
    """Push tokens, with log probabilities, and then the end. Returns the content as streams tell it."""
    told = ""
    for at in range(0, len(token_ids), size):
        piece = token_ids[at : at + size]
        told += answer.push(Update(0, piece, [TokenLogprobs(token, -1.0, 1) for token in piece]))
    return told + answer.push(Update(0, finish_reason=reason))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_content_calls_and_reason(tokenizer: Tokenizer, size: int) -> None:
    token_ids = tokenizer.encode(TEXT)
    answer = Answer(tokenizer, TextOptions(calls=CallOptions(QwenParser)))
    assert tell(answer, token_ids, size=size) == "Look:"
    assert answer.text == "Look:"
    [call] = answer.tool_calls
    assert (call.name, call.arguments) == ("f", '{"a": 1}')
    assert "".join(delta.arguments for delta in answer.call_deltas) == '{"a": 1}'
    assert answer.reason == "tool_calls"
    # As in vLLM: all tokens that the model wrote, markup and all.
    assert [one.logprobs.token_id for one in answer.logprobs] == token_ids


@pytest.mark.parametrize(
    ("reason", "ends_with_calls", "wanted"),
    [
        (FinishReason.STOP, True, "tool_calls"),
        (FinishReason.STOP, False, "stop"),
        (FinishReason.LENGTH, True, "length"),
        (FinishReason.LENGTH, False, "length"),
    ],
)
def test_reasons(tokenizer: Tokenizer, reason: FinishReason, ends_with_calls: bool, wanted: str) -> None:
    answer = Answer(tokenizer, TextOptions(calls=CallOptions(QwenParser, ends_with_calls=ends_with_calls)))
    tell(answer, tokenizer.encode(TEXT), reason)
    assert answer.reason == wanted


def test_the_answer_ends_with_the_one_call_that_is_wanted(tokenizer: Tokenizer) -> None:
    first, rest = tokenizer.encode(TEXT), tokenizer.encode("\n" + TEXT)
    answer = Answer(tokenizer, TextOptions(calls=CallOptions(partial(QwenParser, 1))))
    told = answer.push(Update(0, first + rest))
    assert (told, answer.finish_reason, answer.reason) == ("Look:", FinishReason.STOP, "tool_calls")
    assert answer.completion_tokens == len(first)
    assert len(answer.tool_calls) == 1
    assert answer.push(Update(0, rest)) == ""


def test_stop_string_inside_a_call_loses_nothing(tokenizer: Tokenizer) -> None:
    """What was held back comes out: here as content, because it is no whole call."""
    answer = Answer(tokenizer, TextOptions(stop=("</tool_call>",), calls=CallOptions(QwenParser)))
    tell(answer, tokenizer.encode(TEXT))
    assert [call.arguments for call in answer.tool_calls] == ['{"a": 1}']  # whole already
    answer = Answer(tokenizer, TextOptions(stop=("name",), calls=CallOptions(QwenParser)))
    assert tell(answer, tokenizer.encode(TEXT)) == 'Look: <tool_call>\n{"'
    assert (answer.text, answer.tool_calls, answer.reason) == ('Look: <tool_call>\n{"', [], "stop")


def test_a_call_that_never_became_whole_is_content_of_the_whole_answer(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, TextOptions(calls=CallOptions(QwenParser)))
    cut = TEXT[: TEXT.index("1}}")]
    told = tell(answer, tokenizer.encode(cut), FinishReason.LENGTH)
    assert told == "Look:"  # a stream has told the rest as a call
    assert answer.call_deltas[0].name == "f"
    assert (answer.text, answer.tool_calls, answer.reason) == (cut, [], "length")


def test_the_parser_sees_special_tokens_and_clients_do_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    backend = tokenizer.backend.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True), AddedToken("<|eom_id|>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    mistral = Tokenizer(tmp_path / "tokenizer.json")
    opener = mistral.token_id("[TOOL_CALLS]")
    assert opener in mistral.special_ids
    token_ids = mistral.encode('hi<|im_start|> [TOOL_CALLS][{"name": "f", "arguments": {}}]<|eom_id|>')
    options = CallOptions(MistralParser, frozenset((opener,)))
    answer = Answer(mistral, TextOptions(calls=options))
    assert tell(answer, token_ids) == "hi"
    assert [call.name for call in answer.tool_calls] == ["f"]
    assert answer.text == "hi"
