"""Fields of the OpenAI dialect that change nothing here, those that are refused by name, and the table of both."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any

import msgspec
from msgspec import Meta

IGNORED: dict[str, str] = {
    "audio moderation prediction reasoning_effort verbosity web_search_options": "no model here has a use for them",
    "metadata safety_identifier service_tier store user": "nothing is kept, and all requests are of one tier",
    "prompt_cache_key prompt_cache_options prompt_cache_retention": "prefixes are always cached; see `cache_salt`",
    "guided_decoding_backend include_reasoning spaces_between_special_tokens stream_interval": "as this server is",
}
"""Fields that may be sent without effect, and why. So may all fields that are not known."""

CHAT_REFUSED: dict[str, str] = {
    "modalities": "other than text; no model here speaks",
    "best_of": "other than `n`; use `/v1/completions`",
    "chat_template": "templates are programs; use `chat_template_kwargs`",
    "documents": "no template here reads them",
}
"""What chats refuse besides."""
TEXT_REFUSED: dict[str, str] = {"suffix": "no model here fills gaps", "logprobs: true": "a number here"}
"""What text completions refuse besides."""


class Refused(msgspec.Struct, kw_only=True):
    """Extensions of other servers that change answers and are not served. Each is refused by name when it is used, and
    described by why, or by what to use."""

    use_beam_search: Annotated[Any, Meta(description="refused: there is none")] = None
    length_penalty: Annotated[Any, Meta(description="refused: belongs to beam search; 1 may be sent")] = None
    logprob_token_ids: Annotated[Any, Meta(description="refused: use `logprobs` and `top_logprobs`")] = None
    logits_processors: Annotated[Any, Meta(description="refused: code of clients is not run")] = None
    thinking_token_budget: Annotated[Any, Meta(description="refused: thoughts are not told apart from answers")] = None
    repetition_detection: Annotated[Any, Meta(description="refused: use the penalties")] = None
    guided_whitespace_pattern: Annotated[
        Any, Meta(description="refused: blanks between JSON tokens are bounded anyway")
    ] = None
    prompt_embeds: Annotated[Any, Meta(description="refused: send text or tokens")] = None
    mm_processor_kwargs: Annotated[Any, Meta(description="refused: send `detail: low` for fewer tokens")] = None
    media_io_kwargs: Annotated[Any, Meta(description="refused: the same")] = None
    kv_transfer_params: Annotated[
        Any, Meta(description="refused: would point workers at hosts of the client's choice")
    ] = None
    ec_transfer_params: Annotated[Any, Meta(description="refused: the same")] = None
    vllm_xargs: Annotated[Any, Meta(description="refused: meant for code that is not here")] = None
    return_prompt_text: Annotated[Any, Meta(description="refused: use `return_token_ids` and `/detokenize`")] = None

    def unsupported(self) -> list[str]:
        """Fields that the request uses in a way that can't be served."""
        if self.length_penalty is None and not any(_refused_values(self)):
            return []
        # A length penalty of 1 changes nothing; 0 would.
        return [
            name
            for name, value in zip(_REFUSED_NAMES, _refused_values(self), strict=True)
            if (value not in (None, 1) if name == "length_penalty" else value)
        ]


_REFUSED_NAMES = Refused.__struct_fields__
_refused_values = attrgetter(*_REFUSED_NAMES)


def _reasons() -> dict[str, str]:
    found = {}
    for name, schema in msgspec.json.schema(Refused)["$defs"]["Refused"]["properties"].items():
        found[name] = str(schema["description"]).removeprefix("refused: ")
    return found


REFUSED = _reasons()
"""Field → why it is refused, or what to use."""


def table(further: Mapping[str, str]) -> str:
    """What a description in `/docs` ends with: fields that do less than their name says.

    Args:
        further: fields of the endpoint that are refused too, and why.
    """
    rows = [(f"`{name}`", "refused", reason) for name, reason in (REFUSED | dict(further)).items()]
    rows += [(", ".join(f"`{name}`" for name in names.split()), "no effect", why) for names, why in IGNORED.items()]
    return "\n".join(["| field | here | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])
