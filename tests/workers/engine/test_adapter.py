from __future__ import annotations

import pytest
import torch

from epd.errors import WorkerFailed
from tests.workers.engine.oracle import IMAGE, Oracle, add, make_engine, picture, provide, run
from workers.engine.request import ImagePlaceholder


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        ((1, 4, 8), "IIIIIII"),
        ((1, 4, 4), "IIIIIIII"),
        ((1, -4, -8), "IIIIIIII"),
        ((0, 4, 8), "IIIIIIII"),
        ((2, 3, 5), "IIIIIIII"),
        ((1, 4, 8), "IIIItIIII"),
    ],
)
def test_a_grid_that_cannot_be_is_the_encoders_fault(
    vision_oracle: Oracle, grid: tuple[int, int, int], tokens: str
) -> None:
    engine = make_engine(vision_oracle.path)
    token_ids = [vision_oracle.image_token_id if token == "I" else 5 for token in tokens]
    with pytest.raises(WorkerFailed):
        engine.provide_embeddings("k", token_ids, grid, torch.ones(tokens.count("I"), engine.info.hidden_size))
    assert not engine.has_embeddings("k")


def test_text_around_the_image_tokens_of_an_expansion_is_text(vision_oracle: Oracle) -> None:
    """As of a processor that wraps pictures itself: start and end tokens come with the expansion."""
    image = picture(1)
    encoded = vision_oracle.encode(image, "k")
    whole = vision_oracle.prompt(f"a {IMAGE} b", [encoded])
    at = whole.placeholders[0].offset
    engine = make_engine(vision_oracle.path)
    wrapped = [whole.token_ids[at - 1], *encoded.token_ids, whole.token_ids[at + 1]]
    engine.provide_embeddings("wrapped", wrapped, encoded.grid_thw, encoded.rows)
    provide(engine, encoded)
    add(engine, "plain", whole)
    whole.token_ids = whole.token_ids[: at - 1] + whole.token_ids[at : at + 1] + whole.token_ids[at + 2 :]
    whole.placeholders = [ImagePlaceholder("wrapped", at - 1)]
    add(engine, "wrapped", whole)
    tokens = run(engine).tokens
    assert tokens["plain"] == tokens["wrapped"]


def test_pictures_without_text_between_are_refused_and_the_engine_goes_on(vision_oracle: Oracle) -> None:
    encoded = vision_oracle.encode(picture(1), "k")
    prompt = vision_oracle.prompt(f"{IMAGE} what?", [encoded])
    at = prompt.placeholders[0].offset
    prompt.token_ids.insert(at, prompt.token_ids[at])
    prompt.placeholders.append(ImagePlaceholder("k", at + 1))
    engine = make_engine(vision_oracle.path)
    provide(engine, encoded)
    add(engine, "touching", prompt)
    add(engine, "fine", vision_oracle.prompt(f"{IMAGE} what?", [encoded]))
    answers = run(engine)
    error = answers.ends["touching"].error
    assert error is not None
    assert error.code == "invalid_request"
    assert len(answers.tokens["fine"]) == 12
