"""An answer that goes on in another engine is the answer that the first one would have given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from epd.errors import InvalidRequest
from epd.types import FinishReason, Grammar, GrammarKind, Pooling, PoolingKind, SamplingParams, WorkerTask
from tests.workers.engine.fakes import CONTEXT, EOS, IMAGE_TOKEN, VOCAB, FakeRunner, fake_engine
from tests.workers.engine.oracle import IMAGE, Answers, Oracle, Prompt, make_engine, picture, provide, run
from workers.engine.engine import Engine
from workers.engine.outputs import StepOutput
from workers.engine.request import ImagePlaceholder

TEXT = "the quick brown fox jumps over the lazy dog. what is left?"
CUTS = (1, 5, 16, 23)
DATE = Grammar(GrammarKind.REGEX, r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d T\d\d:\d\d:\d\d( UTC)?")
BIAS = tuple((token, 12.0) for token in range(20, 30))
"""Has answers repeat themselves, so that penalties have something to do."""
FREE: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 7},
    "filtered": {"seed": 8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "repeating": {"temperature": 0, "logit_bias": BIAS},
    "frequency": {"temperature": 0, "logit_bias": BIAS, "frequency_penalty": 1.0},
    "presence": {"temperature": 0, "logit_bias": BIAS, "presence_penalty": 1.0},
    "repetition": {"temperature": 0, "logit_bias": BIAS, "repetition_penalty": 1.3},
    "logprobs": {"temperature": 0, "logprobs": 3},
}


def lost_and_resumed(path: Any, prompt: Prompt, samplings: dict[str, SamplingParams]) -> tuple[Answers, Answers]:
    """Answers of one engine, and of another one that is given the beginnings: named `name/cut`."""
    lost, other = make_engine(path), make_engine(path, max_num_batched_tokens=16)
    for image in prompt.images:
        provide(lost, image)
    for name, sampling in samplings.items():
        lost.add_request(name, prompt.token_ids, sampling, images=prompt.placeholders)
    whole = run(lost)
    for name, sampling in samplings.items():
        for cut in CUTS:
            if cut < len(whole.tokens[name]):
                beginning = whole.tokens[name][:cut]
                other.add_request(
                    f"{name}/{cut}",
                    prompt.token_ids,
                    sampling,
                    images=prompt.placeholders,
                    resume_token_ids=beginning,
                )
    for image in prompt.images:  # those who wait for them compute nothing of the answer
        provide(other, image)
    return whole, run(other)


def check_rest(whole: Answers, resumed: Answers) -> None:
    for name, tokens in resumed.tokens.items():
        kind, cut = name.split("/")
        expected, end = whole.ends[kind], resumed.ends[name]
        assert tokens == whole.tokens[kind][int(cut) :], name
        assert (end.finish_reason, end.stop_token_id, end.prompt_tokens) == (
            expected.finish_reason,
            expected.stop_token_id,
            expected.prompt_tokens,
        )
        assert end.cached_tokens <= end.prompt_tokens
        assert resumed.outputs[name][0].prompt_tokens == end.prompt_tokens, "the first output tells the prompt's length"


def test_sampling_goes_on_as_if_nothing_had_happened(qwen2: Oracle) -> None:
    samplings = {name: SamplingParams(max_tokens=24, ignore_eos=True, **fields) for name, fields in FREE.items()}
    whole, resumed = lost_and_resumed(qwen2.path, qwen2.prompt(TEXT), samplings)
    assert len(resumed.tokens) == len(FREE) * len(CUTS)
    check_rest(whole, resumed)
    others = {tuple(tokens) for name, tokens in whole.tokens.items() if name != "logprobs"}
    assert len(others) == len(FREE) - 1, "some parameters make no difference"
    given = [entry for output in whole.outputs["logprobs"] for entry in output.logprobs]
    for cut in CUTS:
        again = [entry for output in resumed.outputs[f"logprobs/{cut}"] for entry in output.logprobs]
        assert [entry.token_id for entry in again] == [entry.token_id for entry in given[cut:]]
        for one, other in zip(again, given[cut:], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_grammars_and_ends_go_on_where_they_were(qwen2: Oracle) -> None:
    prompt = qwen2.prompt(TEXT)
    free = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    engine = make_engine(qwen2.path)
    engine.add_request("free", prompt.token_ids, free)
    said = run(engine).tokens["free"]
    samplings = {
        "grammar": SamplingParams(max_tokens=64, seed=3, temperature=1.5, grammar=DATE),
        # The answer ends at the first of these that comes late enough: not before 20, counted from its beginning.
        "min_tokens": msgspec.structs.replace(free, min_tokens=20, stop_token_ids=tuple(said)),
        "bad_words": msgspec.structs.replace(free, bad_words=((said[4], said[5]), (said[15], said[16]))),
    }
    whole, resumed = lost_and_resumed(qwen2.path, prompt, samplings)
    check_rest(whole, resumed)
    assert {name.split("/")[0] for name in resumed.tokens} == set(samplings)
    assert whole.ends["grammar"].finish_reason is FinishReason.STOP
    assert whole.tokens["bad_words"] != said


def test_pictures_come_before_what_is_resumed(vision_oracle: Oracle) -> None:
    encoded = [vision_oracle.encode(picture(seed), f"k{seed}") for seed in (1, 2)]
    prompt = vision_oracle.prompt(f"{TEXT} first {IMAGE} second {IMAGE} is?", encoded)
    samplings = {
        "greedy": SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
        "sampled": SamplingParams(max_tokens=24, seed=4, repetition_penalty=1.2, ignore_eos=True),
    }
    whole, resumed = lost_and_resumed(vision_oracle.path, prompt, samplings)
    assert len(resumed.tokens) == 2 * len(CUTS)
    check_rest(whole, resumed)


# -- edges, on a model that is a formula -----------------------------------------------------------------------------


@pytest.fixture
def engine() -> Engine:
    return fake_engine(FakeRunner())


def ends_at_once(engine: Engine) -> StepOutput:
    outputs = engine.step()
    assert [output.request_id for output in outputs] == ["r"]
    assert outputs[0].token_ids == ()
    engine.check_integrity()
    return outputs[0]


def test_an_answer_that_was_whole_ends_at_once(engine: Engine) -> None:
    engine.add_request("r", [1, 2], SamplingParams(max_tokens=3), resume_token_ids=[5, 6, 7])
    assert ends_at_once(engine).finish_reason is FinishReason.LENGTH
    engine.add_request("r", [1, 2], SamplingParams(max_tokens=9), resume_token_ids=[5, EOS])
    end = ends_at_once(engine)
    assert (end.finish_reason, end.stop_token_id, end.prompt_tokens) == (FinishReason.STOP, EOS, 2)


def test_an_answer_that_fills_the_context_ends_at_once(engine: Engine) -> None:
    for length in (CONTEXT - 2, 2 * CONTEXT):
        engine.add_request("r", [1, 2], SamplingParams(), resume_token_ids=[5] * length)
        assert ends_at_once(engine).finish_reason is FinishReason.LENGTH


def test_what_was_resumed_is_prefilled_in_chunks(engine: Engine) -> None:
    engine.add_request("r", [1, 2], SamplingParams(max_tokens=42), resume_token_ids=range(40))
    outputs = [output for _ in range(4) for output in engine.step()]
    assert [output.token_ids for output in outputs] == [(42,), (43,)]
    assert outputs[1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("tokens", [(VOCAB,), (-1, 3), (EOS, 3)])
def test_tokens_that_can_be_no_answer_are_refused(engine: Engine, tokens: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.add_request("r", [1, 2], SamplingParams(), resume_token_ids=tokens)
    assert caught.value.param == "resume_token_ids"
    engine.check_integrity()
    assert not engine.has_work()


def test_vectors_are_not_resumed(engine: Engine) -> None:
    engine.info = replace(engine.info, task=WorkerTask.EMBED)
    with pytest.raises(InvalidRequest, match="resumed"):
        engine.add_request("r", [1], SamplingParams(), pooling=Pooling(PoolingKind.MEAN), resume_token_ids=[1])


def test_tokens_against_the_grammar_end_the_request(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path)
    letters = qwen2.tokenizer("fox", add_special_tokens=False)["input_ids"]
    engine.add_request("r", [1, 2], SamplingParams(grammar=DATE), resume_token_ids=letters)
    error = ends_at_once(engine).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_request", "response_format")


def test_prompt_logprobs_are_not_given_again(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path)
    sampling = SamplingParams(max_tokens=4, prompt_logprobs=1)
    engine.add_request("r", qwen2.prompt(TEXT).token_ids, sampling, resume_token_ids=[5, 6])
    outputs = run(engine).outputs["r"]
    assert [output.prompt_logprobs for output in outputs] == [(), ()]


def test_an_answer_that_waits_for_pictures_computes_what_stands_before_them(engine: Engine) -> None:
    images = [ImagePlaceholder("k", 8)]
    engine.add_request(
        "r", [1] * 8 + [IMAGE_TOKEN, 3], SamplingParams(max_tokens=9), images=images, resume_token_ids=[7]
    )
    while engine.has_work():
        assert engine.step() == []
        engine.check_integrity()
