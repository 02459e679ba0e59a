"""Requests of the OpenAI dialect, as structs that decode and check types at once.

Unknown fields are accepted, as all clients of this dialect expect. What is known and can't be served stands in
`unsupported` and is refused by name. Descriptions show up in `/docs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from proxy.api.openai.fields import Refused
from proxy.request_context import REQUEST_ID_PATTERN

MAX_SAMPLES = 128
MAX_LOGPROBS = 20
CACHE_SALT = r"[^@/\\\x00]{1,128}"

_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Samples = Annotated[int, Meta(ge=1, le=MAX_SAMPLES)]
_Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
_SessionId = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class ImageURL(msgspec.Struct):
    """Where a picture is."""

    url: Annotated[str, Meta(description="data:, http(s): or, when the server allows it, file: URL")]
    detail: Annotated[str | None, Meta(description="low: use fewer tokens; anything else: the model's own size")] = None


class ContentPart(msgspec.Struct):
    """Part of a message: text or a picture."""

    type: Annotated[str | None, Meta(description="text or image_url; guessed from the other keys when absent")] = None
    text: Annotated[str | None, Meta(description="of a text part")] = None
    image_url: ImageURL | str | None = None
    refusal: Annotated[str | None, Meta(description="of a refusal part, which is read as text")] = None
    input_audio: Annotated[Any, Meta(description="refused: no model here takes it")] = None
    audio_url: Annotated[Any, Meta(description="refused: no model here takes it")] = None
    video_url: Annotated[Any, Meta(description="refused: no model here takes it")] = None
    file: Annotated[Any, Meta(description="refused: no model here takes it")] = None
    image_embeds: Annotated[Any, Meta(description="refused: send the picture")] = None
    audio_embeds: Annotated[Any, Meta(description="refused: no model here takes it")] = None
    image_pil: Annotated[Any, Meta(description="refused: send image_url")] = None
    uuid: Annotated[str | None, Meta(description="no effect: pictures are known by their content")] = None


class CalledFunction(msgspec.Struct):
    """What an earlier tool call called."""

    name: Annotated[str, Meta(description="of the function")]
    arguments: Annotated[str | dict[str, Any] | None, Meta(description="JSON text, as the answer had it")] = None


class MessageCall(msgspec.Struct):
    """A tool call of an earlier answer."""

    function: CalledFunction
    id: Annotated[str | None, Meta(description="which tool_call_id names")] = None
    type: Annotated[str | None, Meta(description="function")] = None


class ChatMessage(msgspec.Struct):
    """One turn of the conversation."""

    role: Annotated[str, Meta(description="system, developer (the same), user, assistant, tool or function")]
    content: Annotated[
        str | list[ContentPart] | None, Meta(description="text, or parts of text and pictures; may be null")
    ] = None
    name: Annotated[str | None, Meta(description="of who speaks, for templates that show it")] = None
    tool_calls: Annotated[list[MessageCall] | None, Meta(description="of an assistant's turn")] = None
    tool_call_id: Annotated[str | None, Meta(description="the call that a tool's turn answers")] = None
    function_call: Annotated[CalledFunction | None, Meta(description="deprecated; the same as one tool call")] = None
    refusal: Annotated[str | None, Meta(description="has no effect")] = None


class PlainTurn(list[ChatMessage]):
    """The conversation of a body whose `messages` are a plain string: one user's turn."""


if TYPE_CHECKING:
    _Conversation = list[ChatMessage]
else:  # a string is what LMDeploy's clients may send; there is none once a request is made
    _Conversation = Annotated[list[ChatMessage], Meta(min_length=1)] | str


class FunctionDefinition(msgspec.Struct):
    """A function that the model may call."""

    name: Annotated[str, Meta(description="that calls have")]
    description: Annotated[str | None, Meta(description="for the model")] = None
    parameters: Annotated[dict[str, Any] | None, Meta(description="a JSON schema; absent: it takes none")] = None
    strict: Annotated[
        bool | None, Meta(description="arguments follow the schema also where the model decides whether to call")
    ] = None


class Tool(msgspec.Struct):
    """A tool that the model may call."""

    function: FunctionDefinition | None = None
    type: Annotated[str, Meta(description="function")] = "function"


class StreamOptions(msgspec.Struct):
    """What a stream holds besides the text."""

    include_usage: Annotated[bool | None, Meta(description="send a last chunk with token counts")] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="with include_usage: send the counts so far in every chunk")
    ] = None
    include_obfuscation: Annotated[bool | None, Meta(description="no effect: nothing is added to hide lengths")] = None


class JSONSchemaFormat(msgspec.Struct):
    """The schema of a `response_format`."""

    schema: Annotated[dict[str, Any] | bool | None, Meta(description="a JSON schema")] = None
    name: Annotated[str | None, Meta(description="has no effect")] = None
    description: Annotated[str | None, Meta(description="has no effect")] = None
    strict: Annotated[bool | None, Meta(description="the schema is enforced either way")] = None


class ResponseFormat(msgspec.Struct):
    """What an answer must look like, in the words of OpenAI, or of LightLLM, which sends `schema` alone."""

    type: Annotated[
        str | None, Meta(description="text, json_object or json_schema; json_schema by default, where there is one")
    ] = None
    json_schema: JSONSchemaFormat | None = None
    schema: Annotated[
        dict[str, Any] | bool | None, Meta(description="a JSON schema; as json_schema.schema, which wins")
    ] = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """What an answer must look like, in the words of vLLM: one of these. A name that is not known may be a form that is
    meant: free text in its place would be a surprise."""

    json: Annotated[dict[str, Any] | bool | str | None, Meta(description="a JSON schema, or one as text")] = None
    regex: Annotated[str | None, Meta(description="matches the whole answer")] = None
    choice: Annotated[list[str] | None, Meta(description="the answer is one of them")] = None
    grammar: Annotated[str | None, Meta(description="a context-free grammar")] = None
    json_object: Annotated[bool | None, Meta(description="any JSON object")] = None
    structural_tag: Annotated[Any, Meta(description="refused")] = None
    disable_fallback: Annotated[Any, Meta(description="has no effect")] = None
    whitespace_pattern: Annotated[Any, Meta(description="refused: blanks are bounded anyway")] = None
    disable_any_whitespace: Annotated[Any, Meta(description="refused: write a regex or grammar")] = None
    disable_additional_properties: Annotated[Any, Meta(description="refused: write it into the schema")] = None


class SamplingRequest(Refused, kw_only=True):
    """What both completion endpoints share."""

    model: Annotated[str | None, Meta(description="name of the served model; default: that model")] = None
    min_tokens: Annotated[_Count | None, Meta(description="no end before")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 is greedy; default: the model's own, else 1")
    ] = None
    top_p: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="only the likeliest tokens that have this probability together; 1: all"),
    ] = None
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None, Meta(description="0 or -1: all")] = None
    min_p: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="only tokens at least so likely, as a share of the likeliest"),
    ] = None
    seed: Annotated[_Int64 | None, Meta(description="the same seed and request give the same answer")] = None
    n: Annotated[_Samples | None, Meta(description="answers to one prompt")] = None
    stop: Annotated[
        str | list[str] | bool | None,
        Meta(
            description="up to 16 strings (--max-stop-strings) that end the answer; true, in chats only: stop the "
            "answer that the session is getting, and answer nothing"
        ),
    ] = None
    include_stop_str_in_output: Annotated[bool | None, Meta(description="show what ended the answer")] = None
    stop_token_ids: Annotated[
        list[_TokenId] | None, Meta(description="tokens that end the answer beside the model's own")
    ] = None
    ignore_eos: Annotated[bool | None, Meta(description="go on behind the model's own end")] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="leave control tokens out of the text; default: true")
    ] = None
    stream: Annotated[bool | None, Meta(description="answer as server-sent events")] = None
    stream_options: StreamOptions | None = None
    priority: Annotated[_Int64 | None, Meta(description="smaller goes first; default 0")] = None
    timings: Annotated[bool | None, Meta(description="tell in the answer where the time went, in ms")] = None
    return_token_ids: Annotated[
        bool | None, Meta(description="give the tokens beside the text; a picture is one placeholder")
    ] = None
    presence_penalty: Annotated[_Penalty | None, Meta(description="against tokens that the answer has")] = None
    frequency_penalty: Annotated[_Penalty | None, Meta(description="against them as often as it has them")] = None
    repetition_penalty: Annotated[
        Annotated[float, Meta(ge=0.01, le=100)] | None,
        Meta(description="against tokens that prompt or answer have; 1: none"),
    ] = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None,
        Meta(description="token id as a string → added to its logit"),
    ] = None
    bad_words: Annotated[list[str] | None, Meta(description="texts that the answer must not have")] = None
    allowed_token_ids: Annotated[list[_TokenId] | None, Meta(description="only these tokens may come")] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Meta(description="call tokens `token_id:5` in log probabilities, instead of by their text")
    ] = None
    request_id: Annotated[
        Annotated[str, Meta(extra_json_schema={"pattern": f"^{REQUEST_ID_PATTERN}$"})] | None,
        Meta(description="a name for /abort and for logs; as the header X-Request-Id, and wins"),
    ] = None
    cache_salt: Annotated[
        Annotated[str, Meta(extra_json_schema={"pattern": f"^{CACHE_SALT}$"})] | None,
        Meta(description="share cached prefixes only with requests that have the same one: nobody else can time them"),
    ] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None,
        Meta(description="cut a longer prompt to so many tokens; -1: to what fits into the context; no pictures"),
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, Meta(description="where it is cut; default: left, the beginning")
    ] = None
    prompt_logprobs: Annotated[
        _Logprobs | None, Meta(description="log probabilities of the prompt's tokens and so many others; not streamed")
    ] = None
    guided_json: Annotated[dict[str, Any] | bool | str | None, Meta(description="as structured_outputs.json")] = None
    guided_regex: Annotated[str | None, Meta(description="as structured_outputs.regex")] = None
    guided_choice: Annotated[list[str] | None, Meta(description="as structured_outputs.choice")] = None
    guided_grammar: Annotated[str | None, Meta(description="as structured_outputs.grammar")] = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None


class ChatRequest(SamplingRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[_Conversation, Meta(description="the conversation; a plain string is one turn of the user")]
    max_tokens: Annotated[_Positive | None, Meta(description="tokens to generate at most")] = None
    max_completion_tokens: Annotated[_Positive | None, Meta(description="the same as max_tokens, and wins")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="switches of the chat template, such as enable_thinking")
    ] = None
    logprobs: Annotated[bool | None, Meta(description="give log probabilities of the answer's tokens")] = None
    top_logprobs: Annotated[_Logprobs | None, Meta(description="of so many most likely ones too; needs logprobs")] = (
        None
    )
    best_of: Annotated[int | None, Meta(description="may be n alone; see /v1/completions")] = None
    tools: Annotated[list[Tool] | None, Meta(description="functions that the model may call")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        Meta(
            description="none, auto (the default), required (a call is enforced), "
            '{"type": "function", "function": {"name": …}} (enforced too), or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": auto or required, "tools": […]}}'
        ),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="false: one call at most")] = None
    functions: Annotated[list[FunctionDefinition] | None, Meta(description="deprecated: tools")] = None
    function_call: Annotated[str | dict[str, Any] | None, Meta(description="deprecated: tool_choice")] = None
    modalities: Annotated[list[str] | None, Meta(description="text only")] = None
    chat_template: Annotated[
        str | None, Meta(description="refused: templates are programs; see chat_template_kwargs")
    ] = None
    documents: Annotated[list[Any] | None, Meta(description="refused: no template here reads them")] = None
    echo: Annotated[
        bool | None, Meta(description="begin the answer with the last message, if that is the assistant's")
    ] = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="put the tokenizer's own tokens around what the chat template made")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="go on with the text of the last message; then without a header for the answer")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="true: end the prompt with the header of the answer; not with the above")
    ] = None
    session_id: Annotated[
        _SessionId | None,
        Meta(
            description="with a plain string in messages: the server keeps the conversation under this number",
            examples=[7],
        ),
    ] = None
    instance_id: Annotated[_SessionId | None, Meta(description="the same as session_id")] = None
    renew_session: Annotated[bool | None, Meta(description="end the session first")] = None

    def __post_init__(self) -> None:
        given: Any = self.messages
        if isinstance(given, str):
            self.messages = PlainTurn([ChatMessage("user", given)])

    def unsupported(self) -> list[str]:
        """See `Refused.unsupported`."""
        found = super().unsupported()
        if self.best_of is not None and self.best_of != (self.n or 1):
            found.append("best_of")
        if self.modalities is not None and any(kind != "text" for kind in self.modalities):
            found.append("modalities")
        if self.chat_template is not None:
            found.append("chat_template")
        if self.documents:
            found.append("documents")
        return found


class CompletionRequest(SamplingRequest, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str | list[str | _TokenId | list[_TokenId]] | None,
        Meta(description="a text, several texts, token ids, or several lists of token ids; null: a new document"),
    ]
    max_tokens: Annotated[
        _Count | None, Meta(description="tokens to generate at most, 16 by default; 0 with echo scores the prompt")
    ] = None
    echo: Annotated[bool | None, Meta(description="begin the answer with the prompt")] = None
    logprobs: Annotated[
        _Logprobs | bool | None, Meta(description="log probabilities of each token and of so many most likely ones")
    ] = None
    best_of: Annotated[
        _Samples | None, Meta(description="make so many samples, answer with the n likeliest per token; not streamed")
    ] = None
    suffix: Annotated[str | None, Meta(description="refused: no model here fills gaps")] = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="put the tokenizer's own tokens around each text; default: true")
    ] = None

    def unsupported(self) -> list[str]:
        """See `Refused.unsupported`."""
        found = super().unsupported()
        if self.suffix:
            found.append("suffix")
        if self.logprobs is True:  # a number here
            found.append("logprobs")
        if self.stop is True:  # there is no session to stop
            found.append("stop")
        return found
