"""Predictions from made-up traces."""

from __future__ import annotations

import pytest

from workers.load_model import EncodeModel, PrefillDecodeModel


def decoding(batch: int) -> float:
    return 10 + 0.5 * batch


@pytest.fixture
def learned() -> PrefillDecodeModel:
    model = PrefillDecodeModel()
    for batch in (1, 8, 2, 4) * 10:
        model.observe_step(0, batch, decoding(batch))
        model.observe_step(100, 0, 200.0)
        model.observe_step(50, batch, 100 + decoding(batch))
    return model


def test_nothing_is_known_at_first() -> None:
    model = PrefillDecodeModel()
    assert (model.ms_per_token, model.step_ms(4), model.work_ms(100, 100, 4)) == (0, 0, 0)
    assert EncodeModel().picture_ms(2) == EncodeModel().patches_ms(100) == 0


def test_prompt_tokens_and_steps_are_told_apart(learned: PrefillDecodeModel) -> None:
    assert learned.ms_per_token == pytest.approx(2.0, rel=0.02)
    for batch in (1, 3, 8, 16):
        assert learned.step_ms(batch) == pytest.approx(decoding(batch), rel=0.02)


def test_work_is_prompts_and_steps_of_the_batch(learned: PrefillDecodeModel) -> None:
    assert learned.work_ms(1000, 0, 0) == pytest.approx(2000, rel=0.02)
    assert learned.work_ms(0, 400, 4) == pytest.approx(100 * decoding(4), rel=0.02)


def test_one_batch_size_alone_says_nothing_of_others() -> None:
    model = PrefillDecodeModel()
    for _ in range(5):
        model.observe_step(0, 4, 12.0)
    assert model.step_ms(4) == model.step_ms(1) == pytest.approx(12.0)


def test_noise_never_makes_time_negative() -> None:
    model = PrefillDecodeModel()
    for batch, ms in ((8, 5.0), (1, 30.0), (8, 4.0), (9, 200.0)):
        model.observe_step(0, batch, ms)
        assert all(model.step_ms(size) >= 0 for size in (0, 1, 4, 64))


def test_a_worker_that_became_slower_is_believed_soon(learned: PrefillDecodeModel) -> None:
    for _ in range(40):
        learned.observe_step(100, 0, 800.0)
        learned.observe_step(0, 4, 4 * decoding(4))
    assert learned.ms_per_token == pytest.approx(8.0, rel=0.2)
    assert learned.step_ms(4) == pytest.approx(4 * decoding(4), rel=0.2)


def test_answers_are_as_long_as_they_use_to_be() -> None:
    model = PrefillDecodeModel()
    assert model.remaining_tokens(0, 10) == 10
    assert model.remaining_tokens(0, 100_000) < 1000, "nobody uses a whole context"
    for _ in range(20):
        model.observe_answer(40)
    assert model.remaining_tokens(0, 3000) == pytest.approx(40)
    assert model.remaining_tokens(30, 3000) == pytest.approx(10)
    assert model.remaining_tokens(30, 35) == pytest.approx(5)
    assert model.remaining_tokens(50, 3000) == pytest.approx(40)
    assert model.remaining_tokens(50, 50) == 0


def test_pictures_cost_by_their_patches() -> None:
    model = EncodeModel()
    for pictures, patches in ((1, 100), (4, 1000), (2, 300)) * 10:
        model.observe_batch(pictures, patches, 0.5 * patches)
        model.observe_preprocessing(30.0)
    assert model.patches_ms(800) == pytest.approx(400)
    assert model.picture_ms(2) == pytest.approx(15 + 0.5 * 200, rel=0.1)
