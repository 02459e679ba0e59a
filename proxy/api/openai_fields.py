"""Fields of the OpenAI dialect that change nothing here, those that are refused by name, and the table of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

IGNORED: dict[str, str] = {
    "audio moderation prediction reasoning_effort verbosity web_search_options": "no model here has a use for them",
    "metadata safety_identifier service_tier store user": "nothing is kept, and all requests are of one tier",
    "prompt_cache_key prompt_cache_options prompt_cache_retention": "prefixes are always cached; see `cache_salt`",
    "guided_decoding_backend include_reasoning spaces_between_special_tokens stream_interval": "as this server is",
}
"""Fields that may be sent without effect, and why. So may all fields that are not known."""

REFUSED: dict[str, str] = {
    "use_beam_search": "there is none",
    "length_penalty": "belongs to beam search; 1 may be sent",
    "logprob_token_ids": "use `logprobs` and `top_logprobs`",
    "logits_processors": "code of clients is not run",
    "thinking_token_budget": "thoughts are not told apart from answers",
    "repetition_detection": "use the penalties",
    "guided_whitespace_pattern": "blanks between JSON tokens are bounded anyway",
    "prompt_embeds": "send text or tokens",
    "mm_processor_kwargs": "send `detail: low` for fewer tokens",
    "media_io_kwargs": "the same",
    "kv_transfer_params": "would point workers at hosts of the client's choice",
    "ec_transfer_params": "the same",
    "vllm_xargs": "meant for code that is not here",
    "return_prompt_text": "use `return_token_ids` and `/detokenize`",
}
"""Extensions of other servers that change answers and are not served, and why or what to use."""


CHAT_REFUSED: dict[str, str] = {
    "modalities": "other than text; no model here speaks",
    "best_of": "other than `n`; use `/v1/completions`",
    "chat_template": "templates are programs; use `chat_template_kwargs`",
    "documents": "no template here reads them",
}
"""The same, of chats."""
TEXT_REFUSED: dict[str, str] = {"suffix": "no model here fills gaps", "logprobs: true": "a number here"}
"""The same, of text completions."""


class Refused(msgspec.Struct, kw_only=True):
    """The fields of `REFUSED`. Each is refused by name when it is used."""

    use_beam_search: Any = None
    length_penalty: Any = None
    logprob_token_ids: Any = None
    logits_processors: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None
    guided_whitespace_pattern: Any = None
    prompt_embeds: Any = None
    mm_processor_kwargs: Any = None
    media_io_kwargs: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    vllm_xargs: Any = None
    return_prompt_text: Any = None

    def unsupported(self) -> dict[str, bool]:
        """Field → whether the request uses it in a way that can't be served."""
        used = {name: bool(getattr(self, name)) for name in Refused.__struct_fields__}
        return used | {"length_penalty": self.length_penalty not in (None, 1)}  # 1 changes nothing


def table(further: Mapping[str, str]) -> str:
    """What a description in `/docs` ends with: fields that do less than their name says.

    Args:
        further: fields of the endpoint that are refused too, and why.
    """
    rows = [(f"`{name}`", "refused", reason) for name, reason in (REFUSED | dict(further)).items()]
    rows += [(", ".join(f"`{name}`" for name in names.split()), "no effect", why) for names, why in IGNORED.items()]
    return "\n".join(["| field | here | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])
