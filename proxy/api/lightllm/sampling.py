"""Parameters of LightLLM's dialect to ours."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from epd.errors import InvalidRequest
from epd.types import Grammar, GrammarKind, SamplingParams
from proxy.api.lightllm.schema import (
    DEFAULT_NEW_TOKENS,
    MAX_ALLOWED_TOKENS,
    MAX_STOP_SEQUENCES,
    MAX_STOP_TOKENS,
    NativeParameters,
)
from proxy.api.openai.sampling import check_token_ids
from proxy.models.served_model import ServedModel
from proxy.text.answer import TextOptions

_ALMOST_GREEDY = 1e-5


def sampling_of(asked: NativeParameters, model: ServedModel, *, with_logprobs: bool) -> SamplingParams:
    """Sampling parameters without the grammar. What is not asked for is the model's own, then LightLLM's default.

    Raises:
        InvalidRequest: a token does not exist.
    """
    defaults = model.sampling_defaults
    do_sample = defaults.do_sample if asked.do_sample is None else asked.do_sample
    temperature = asked.temperature if asked.temperature is not None else defaults.temperature or 1.0
    is_greedy = not do_sample or temperature < _ALMOST_GREEDY
    top_p = defaults.top_p if asked.top_p is None else asked.top_p
    top_k = defaults.top_k if asked.top_k is None else asked.top_k
    repetition = defaults.repetition_penalty if asked.repetition_penalty is None else asked.repetition_penalty
    return SamplingParams(
        max_tokens=asked.max_new_tokens or DEFAULT_NEW_TOKENS,
        # Theirs counts the token that ends the answer.
        min_tokens=(asked.min_new_tokens or 1) - 1,
        temperature=0.0 if is_greedy else temperature,
        top_k=0 if is_greedy else max(top_k, 0),
        top_p=1.0 if is_greedy else top_p,
        seed=secrets.randbits(62) if asked.seed in (None, -1) else asked.seed,
        ignore_eos=bool(asked.ignore_eos),
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        repetition_penalty=repetition,
        allowed_token_ids=_allowed(asked, model),
        logprobs=0 if with_logprobs else None,
    )


def _allowed(asked: NativeParameters, model: ServedModel) -> tuple[int, ...]:
    field, token_ids = "parameters.allowed_token_ids", asked.allowed_token_ids or []
    if len(token_ids) > MAX_ALLOWED_TOKENS:
        raise InvalidRequest(f"{field}: {len(token_ids)} tokens; at most {MAX_ALLOWED_TOKENS}.", param=field)
    if token_ids and grammar_of(asked) is not None:
        raise InvalidRequest(f"{field} does not go with a grammar; send one of them.", param=field)
    check_token_ids(token_ids, model.tokenizer, field)
    return tuple(dict.fromkeys(token_ids))


def grammar_of(asked: NativeParameters) -> tuple[str, Grammar] | None:
    """The field that asks for a form, and the form, not yet validated; None when the answer is free text.

    Raises:
        InvalidRequest: two fields ask for one.
    """
    schema = asked.guided_json if isinstance(asked.guided_json, str | None) else _json(asked.guided_json)
    found = {
        "regular_constraint": asked.regular_constraint and Grammar(GrammarKind.REGEX, asked.regular_constraint),
        "guided_grammar": asked.guided_grammar and Grammar(GrammarKind.EBNF, asked.guided_grammar),
        "guided_json": schema
        and Grammar(GrammarKind.JSON_SCHEMA, schema if isinstance(schema, str) else _json(schema)),
        "grammar": _of_tgi(asked),
    }
    wanted = [(f"parameters.{name}", grammar) for name, grammar in found.items() if isinstance(grammar, Grammar)]
    if len(wanted) > 1:
        names = " and ".join(name for name, _ in wanted)
        raise InvalidRequest(f"{names} each ask for a form of the answer; send one of them.", param=wanted[1][0])
    return wanted[0] if wanted else None


def _of_tgi(asked: NativeParameters) -> Grammar | None:
    wanted = asked.grammar
    if not wanted:
        return None
    is_text = isinstance(wanted.value, str)
    if wanted.type == "regex" and is_text:
        return Grammar(GrammarKind.REGEX, wanted.value)
    if wanted.type == "json" and (is_text or isinstance(wanted.value, dict)):
        return Grammar(GrammarKind.JSON_SCHEMA, wanted.value if is_text else _json(wanted.value))
    raise InvalidRequest(
        "parameters.grammar: want a type, json or regex, and a schema or an expression as its value.",
        param="parameters.grammar",
    )


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def text_options_of(asked: NativeParameters, model: ServedModel, *, with_pieces: bool) -> TextOptions:
    """How the answer's text is made: what stops it stays in it.

    Raises:
        InvalidRequest: too many stop sequences, an empty one, or one that is too long.
    """
    texts, rows = _stops_of(asked, model)
    return TextOptions(
        stop=tuple(texts),
        stop_sequences=tuple(tuple(row) for row in rows),
        min_tokens=asked.min_new_tokens or 0,
        skip_special_tokens=asked.skip_special_tokens is not False,
        include_stop=True,
        hides_stop_token=not asked.print_eos_token,
        continues_prompt=True,
        with_pieces=with_pieces,
    )


def _stops_of(asked: NativeParameters, model: ServedModel) -> tuple[list[str], list[list[int]]]:
    field = "stop_sequences" if asked.stop_sequences is not None else "stop"
    if asked.stop_sequences is not None and asked.stop:
        raise InvalidRequest("stop is another name of stop_sequences; send one of them.", param="parameters.stop")
    given: str | Sequence[str | list[int]] = asked.stop_sequences or asked.stop or []
    stops = [given] if isinstance(given, str) else given
    field = f"parameters.{field}"
    if len(stops) > MAX_STOP_SEQUENCES:
        raise InvalidRequest(f"{field}: {len(stops)} of them; at most {MAX_STOP_SEQUENCES}.", param=field)
    if not all(stops):
        raise InvalidRequest(f"{field}: one of them is empty; remove it.", param=field)
    texts = [one for one in stops if isinstance(one, str)]
    rows = [one for one in stops if not isinstance(one, str)]
    longest = max([*(len(one) / model.tokenizer.longest_token for one in texts), *map(len, rows)], default=0)
    if longest > MAX_STOP_TOKENS:
        raise InvalidRequest(f"{field}: one is longer than {MAX_STOP_TOKENS} tokens.", param=field)
    for row in rows:
        check_token_ids(row, model.tokenizer, field)
    return texts, rows
