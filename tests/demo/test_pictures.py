"""The data set: deterministic, truthful, and free of what is held out."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from epd.demo import CHECKPOINT_DIR
from epd.demo.batches import BatchMaker, patch_labels
from epd.demo.chat_format import ChatEncoder
from epd.demo.pictures import COLOURS, SIZES, draw_picture
from epd.demo.questions import ask_picture, describe, with_article
from epd.demo.smalltalk import chat
from epd.demo.words import COMMON_WORDS, is_held_out, printed_text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))  # the one that the code trains: tested


@pytest.mark.parametrize("kind", ["one", "pair", "many", "text"])
def test_the_same_seed_draws_the_same_picture(kind: str) -> None:
    first, second = (draw_picture(random.Random(7), kind, (140, 112)) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.things, first.text) == (second.things, second.text)
    assert first.image.size == (140, 112)


@pytest.mark.parametrize("size", [size for size, _ in SIZES])
def test_shapes_lie_inside_and_have_their_colour(size: tuple[int, int]) -> None:
    for seed in range(20):
        picture = draw_picture(random.Random(seed), ("one", "pair", "many")[seed % 3], size)
        pixels = np.asarray(picture.image).astype(int)
        for thing in picture.things:
            left, top, right, bottom = thing.box
            assert left > -1
            assert top > -1
            assert right < size[0] + 1
            assert bottom < size[1] + 1
            centre = pixels[int((top + bottom) / 2), int((left + right) / 2)]
            nearest = min(COLOURS, key=lambda name: float(np.abs(centre - COLOURS[name]).sum()))
            assert nearest == thing.colour


def test_left_and_right_are_true() -> None:
    for seed in range(60):
        pair = draw_picture(random.Random(seed), "pair", (140, 112))
        assert pair.things[0].box[2] <= 72
        assert pair.things[1].box[0] >= 68
        one = draw_picture(random.Random(seed), "one", (140, 112))
        middle = (one.things[0].box[0] + one.things[0].box[2]) / 2
        assert one.side != "left" or middle < 63
        assert one.side != "right" or middle > 77


def test_training_never_prints_what_is_held_out() -> None:
    rng = random.Random(3)
    assert not any(is_held_out(printed_text(rng)) for _ in range(500))
    assert all(is_held_out(printed_text(rng, held_out=True)) for _ in range(50))
    assert 0.05 < sum(map(is_held_out, COMMON_WORDS)) / len(COMMON_WORDS) < 0.15


def test_answers_follow_the_picture() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        picture = draw_picture(rng, "many", (140, 140))
        assert ask_picture(rng, picture, "count").answer == str(len(picture.things))
        word = draw_picture(rng, "text", (140, 84))
        assert ask_picture(rng, word, "read").answer == word.text
        assert word.text in describe(word)
    assert with_article("orange star") == "an orange star"


def test_questions_keep_no_unfilled_slot() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        picture = draw_picture(rng, ("one", "pair", "many", "text")[seed % 4], (112, 112))
        for turn in [ask_picture(rng, picture), *chat(rng)]:
            assert "{" not in turn.question + turn.answer
            assert turn.question
            assert turn.answer


def test_patch_labels_mark_every_glyph() -> None:
    picture = draw_picture(random.Random(5), "text", (168, 84))
    marked = set(patch_labels(picture)[:, 0].tolist()) - {0}
    assert len(marked) == len(set(picture.text))


def test_a_step_depends_on_seed_and_step_only(tokenizer: Tokenizer) -> None:
    makers = [BatchMaker(ChatEncoder(tokenizer), seed=4, rows=6, warmup=100) for _ in range(2)]
    makers[1].make(0)  # what was made before does not matter
    first, second = (maker.make(33) for maker in makers)
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.groups[0].pixels, second.groups[0].pixels)
    other = BatchMaker(ChatEncoder(tokenizer), seed=5, rows=6, warmup=100).make(33)
    assert other.ids.shape != first.ids.shape or not np.array_equal(first.ids, other.ids)


def test_only_assistant_tokens_are_learnt(tokenizer: Tokenizer) -> None:
    batch = BatchMaker(ChatEncoder(tokenizer), seed=4, rows=6, warmup=0).make(0)
    for ids, target in zip(batch.ids, batch.target, strict=True):
        learnt = [int(token) for token in target if token >= 0]
        answers = tokenizer.decode(learnt, skip_special_tokens=False).split("<|im_end|>")
        whole = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert answers[-1] == ""
        for answer in answers[:-1]:
            assert f"assistant\n{answer}<|im_end|>" in whole
