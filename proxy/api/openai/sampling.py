"""Fields of the OpenAI dialect to sampling parameters. What contradicts itself, or names no token, is a 400."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from epd.errors import InvalidRequest
from epd.types import SamplingParams
from proxy.api.openai.schema import CACHE_SALT, ChatRequest, CompletionRequest
from proxy.models.checkpoint import SamplingDefaults
from proxy.models.served_model import ServedModel
from proxy.randomness import random_piece
from proxy.text.answer import TextOptions
from proxy.text.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
MAX_ANSWERS = 2048
MAX_STOP_CHARACTERS = 4096
"""Of one stop string: an answer is compared with its beginnings at each token."""
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 256


def check_supported(request: ChatRequest | CompletionRequest) -> None:
    """Refuse the first field that can't be served, or does not go with another.

    Raises:
        InvalidRequest: there is one.
    """
    for field in request.unsupported():
        raise InvalidRequest(f"{field} is not supported by this server with this value; leave it out.", param=field)
    if request.cache_salt is not None and not re.fullmatch(CACHE_SALT, request.cache_salt):
        raise InvalidRequest("cache_salt: send 1 to 128 characters without @, /, \\ and NUL.", param="cache_salt")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs are not streamed; leave out one of both.", param="prompt_logprobs")
    if isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        return
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens: 0 needs echo: true; there would be no answer.", param="max_tokens")
    _check_best_of(request)


def _check_best_of(request: CompletionRequest) -> None:
    best_of, n = request.best_of, request.n or 1
    if best_of is not None and best_of < n:
        raise InvalidRequest(f"best_of ({best_of}) is less than n ({n}).", param="best_of")
    if best_of is not None and best_of > n and request.stream:
        raise InvalidRequest("best_of can't be streamed: which one is best shows at the end.", param="best_of")


def max_tokens_of(request: ChatRequest | CompletionRequest) -> int | None:
    """The limit that the request sets; None: what is left of the context."""
    if isinstance(request, ChatRequest):
        return request.max_completion_tokens or request.max_tokens
    return DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens


def sampling_of(request: ChatRequest | CompletionRequest, model: ServedModel) -> SamplingParams:
    """Sampling parameters without the grammar, with the model's defaults and a seed drawn where none is given.

    Raises:
        InvalidRequest: two fields contradict each other, or a token id does not exist.
    """
    defaults: SamplingDefaults = model.sampling_defaults
    tokenizer = model.tokenizer
    max_tokens, min_tokens = max_tokens_of(request), request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens ({min_tokens}) is larger than max_tokens ({max_tokens}).", param="min_tokens")
    logprobs, prompt_logprobs = wanted_logprobs(request)
    temperature, top_k, top_p = request.temperature, request.top_k, request.top_p
    repetition_penalty = request.repetition_penalty
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=defaults.temperature if temperature is None else temperature,
        top_k=max(defaults.top_k if top_k is None else top_k, 0),
        top_p=defaults.top_p if top_p is None else top_p,
        min_p=request.min_p or 0.0,
        seed=int.from_bytes(random_piece()[:8]) >> 2 if request.seed is None else request.seed % (1 << 63),
        stop_token_ids=_token_ids(request.stop_token_ids, tokenizer, "stop_token_ids")
        if request.stop_token_ids
        else (),
        ignore_eos=bool(request.ignore_eos),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=defaults.repetition_penalty if repetition_penalty is None else repetition_penalty,
        logit_bias=_logit_bias(request.logit_bias, tokenizer) if request.logit_bias else (),
        bad_words=_bad_words(request.bad_words, tokenizer) if request.bad_words else (),
        allowed_token_ids=() if request.allowed_token_ids is None else _allowed(request.allowed_token_ids, tokenizer),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def wanted_logprobs(request: ChatRequest | CompletionRequest) -> tuple[int | None, int | None]:
    """For how many tokens beside the chosen one log probabilities are needed: of the answer, and of the prompt."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None, request.prompt_logprobs
    shown = shown_logprobs(request)
    of_prompt = request.prompt_logprobs
    if request.echo and shown is not None:
        of_prompt = max(shown, of_prompt or 0)
    # Without them there is no telling which sample is best.
    needed = 0 if shown is None and samples_of(request) > (request.n or 1) else shown
    return needed, of_prompt


def shown_logprobs(request: CompletionRequest) -> int | None:
    """What `logprobs` of a text completion asks for."""
    return None if isinstance(request.logprobs, bool) else request.logprobs


def samples_of(request: CompletionRequest) -> int:
    """Samples to make of each prompt, of which `n` are shown."""
    return max(request.best_of or 1, request.n or 1)


def stop_strings(asked: str | Sequence[str] | None, model: ServedModel, field: str = "stop") -> tuple[str, ...]:
    """The stop strings of a request, which has them in that field.

    Raises:
        InvalidRequest: too many, an empty one, or one that is very long.
    """
    stops = (asked,) if isinstance(asked, str) else tuple(asked or ())
    limit = model.config.max_stop_strings
    if len(stops) > limit:
        raise InvalidRequest(f"{field}: {len(stops)} strings; at most {limit}.", param=field)
    if "" in stops:
        raise InvalidRequest(f"{field}: a string is empty; remove it.", param=field)
    if stops and max(map(len, stops)) > MAX_STOP_CHARACTERS:
        raise InvalidRequest(f"{field}: a string has more than {MAX_STOP_CHARACTERS} characters.", param=field)
    return stops


def text_options_of(request: ChatRequest | CompletionRequest, model: ServedModel) -> TextOptions:
    """How the answer's text is made.

    Raises:
        InvalidRequest: too many stop strings, or an empty one.
    """
    return TextOptions(
        stop=() if isinstance(request.stop, bool) else stop_strings(request.stop, model),
        min_tokens=request.min_tokens or 0,
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop=bool(request.include_stop_str_in_output),
        continues_prompt=isinstance(request, CompletionRequest) or bool(request.continue_final_message),
        # Evaluation harnesses score texts with one token behind and drop that one, so it must be there.
        tells_end=isinstance(request, CompletionRequest),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        with_token_ids=bool(request.return_token_ids),
    )


def check_answers(prompts: int, samples: int) -> None:
    """Check that a request does not ask for a crowd of answers.

    Raises:
        InvalidRequest: it does.
    """
    if prompts * samples > MAX_ANSWERS:
        raise InvalidRequest(
            f"{prompts} prompts with {samples} samples each; at most {MAX_ANSWERS} answers to one request.", param="n"
        )


# -- tokens ------------------------------------------------------------------------------------------------------------


def check_token_ids(token_ids: Iterable[int], tokenizer: Tokenizer, field: str) -> None:
    """Check that the tokens exist.

    Raises:
        InvalidRequest: one does not.
    """
    size = tokenizer.vocab_size
    bad = next((token for token in token_ids if not 0 <= token < size), None)
    if bad is not None:
        raise InvalidRequest(f"{field}: the model has no token {bad}.", param=field)


def _token_ids(token_ids: Sequence[int], tokenizer: Tokenizer, field: str) -> tuple[int, ...]:
    if len(token_ids) > tokenizer.vocab_size:
        raise InvalidRequest(f"{field}: more tokens than the model has.", param=field)
    known = tuple(dict.fromkeys(token_ids))
    check_token_ids(known, tokenizer, field)
    return known


def _allowed(token_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    if not token_ids:
        raise InvalidRequest("allowed_token_ids is empty; no token could come.", param="allowed_token_ids")
    return _token_ids(token_ids, tokenizer, "allowed_token_ids")


def _logit_bias(biases: Mapping[str, float], tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise InvalidRequest(f"logit_bias has {len(biases)} tokens; at most {MAX_BIASES}.", param="logit_bias")
    by_token = {_bias_token(key): float(bias) for key, bias in biases.items()}
    check_token_ids(by_token, tokenizer, "logit_bias")
    return tuple((token, bias) for token, bias in by_token.items() if bias)


def _bias_token(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise InvalidRequest(f"logit_bias: {key[:100]!r} is no token id.", param="logit_bias")
    return int(key)


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each text at the beginning of a word and, with a blank in front, inside a sentence: the tokens differ."""
    if len(words) > MAX_BAD_WORDS or any(len(word) > MAX_BAD_WORD_CHARACTERS for word in words):
        raise InvalidRequest(
            f"bad_words: at most {MAX_BAD_WORDS} of at most {MAX_BAD_WORD_CHARACTERS} characters.", param="bad_words"
        )
    if not all(word.strip() for word in words):
        raise InvalidRequest("bad_words has an empty text; remove it.", param="bad_words")
    variants = [prefix + word.lstrip() for word in words for prefix in ("", " ")]
    return tuple(dict.fromkeys(tuple(tokenizer.encode(variant)) for variant in variants))
