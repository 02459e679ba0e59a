"""Answers told token by token: the texts of the tokens make the text, and stops are found without holding text back."""

from __future__ import annotations

import pytest

from epd.types import FinishReason, TokenLogprobs
from proxy.dispatch.work import Update
from proxy.text.answer import Answer, TextOptions
from proxy.text.tokenizer import StopChecker, Tokenizer


def push(answer: Answer, *token_ids: int, finish: FinishReason | None = None, stop: int | None = None) -> str:
    logprobs = [TokenLogprobs(token, -float(token), 1) for token in token_ids]
    return answer.push(Update(0, list(token_ids), logprobs, finish_reason=finish, stop_token_id=stop))


def test_a_token_within_a_character_has_no_text(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, TextOptions(with_pieces=True))
    token_ids = tokenizer.encode("hé🙂")
    for token_id in token_ids:
        push(answer, token_id)
    assert [piece.token_id for piece in answer.pieces] == token_ids
    assert [piece.text for piece in answer.pieces] == ["h", "", "é", "", "", "", "🙂"]
    assert [piece.logprob for piece in answer.pieces] == [-float(token) for token in token_ids]


def test_a_character_that_never_ends_belongs_to_its_last_token(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, TextOptions(with_pieces=True))
    first, second, *_ = tokenizer.encode("🙂")
    push(answer, first, second, finish=FinishReason.LENGTH)
    assert [piece.text for piece in answer.pieces] == ["", answer.text]
    assert answer.text == "\ufffd"


def test_an_end_that_comes_alone_tells_what_was_held_back(tokenizer: Tokenizer) -> None:
    """Part of a character, with its log probabilities."""
    answer = Answer(tokenizer, TextOptions())
    first, second, *_ = tokenizer.encode("🙂")
    push(answer, first, second)
    assert (answer.text, answer.logprobs) == ("", [])
    push(answer, finish=FinishReason.STOP)
    assert answer.text == "\ufffd"
    assert [shown.logprobs.token_id for shown in answer.logprobs] == [first, second]


def test_the_token_that_ends_the_answer_is_a_piece_without_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    [letter] = tokenizer.encode("h")
    answer = Answer(tokenizer, TextOptions(with_pieces=True, include_stop=True, hides_stop_token=True))
    push(answer, letter, end, finish=FinishReason.STOP, stop=end)
    assert [(piece.token_id, piece.text) for piece in answer.pieces] == [(letter, "h"), (end, "")]
    assert not answer.has_stop


def test_a_row_of_tokens_ends_the_answer_and_is_shown(tokenizer: Tokenizer) -> None:
    x, y, z = (tokenizer.encode(letter)[0] for letter in "XYZ")
    answer = Answer(tokenizer, TextOptions(with_pieces=True, stop_sequences=((y, z), (z, z))))
    assert push(answer, x, y) == "XY"
    assert not answer.has_stop
    push(answer, z, x, x)
    assert (answer.text, answer.finish_reason, answer.has_stop) == ("XYZ", FinishReason.STOP, True)
    assert answer.completion_tokens == len(answer.pieces) == 3


def test_a_row_of_tokens_before_the_least_length_does_not_end_it(tokenizer: Tokenizer) -> None:
    [x] = tokenizer.encode("X")
    answer = Answer(tokenizer, TextOptions(stop_sequences=((x,),), min_tokens=2))
    push(answer, x)
    assert answer.finish_reason is None
    push(answer, x)
    assert answer.text == "XX"


@pytest.mark.parametrize(
    ("pieces", "given"),
    [
        (["a EN", "D b"], ["a EN", "D"]),
        (["a E", "N", "b END"], ["a E", "N", "b END"]),
        (["END"], ["END"]),
        (["ENEN", "D."], ["ENEN", "D"]),
    ],
)
def test_what_is_shown_anyway_is_not_held_back(pieces: list[str], given: list[str]) -> None:
    checker = StopChecker(["END"], include=True)
    assert [checker.push(piece) for piece in pieces] == given
    assert checker.matched == "END"
    assert checker.flush() == ""
