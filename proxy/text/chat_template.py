"""Messages to prompt tokens: the checkpoint's Jinja template, rendered as transformers renders it.

User text can't smuggle control tokens in. The rendered text is encoded as a whole, which gives the ids that
transformers gives. Only when some user text could form the literal of an added token does it matter who wrote what:

    render with markers around each user string → strip them, keep the spans → every literal that overlaps a span
    is cut in two → encode the pieces

A marked rendering that differs from the plain one (the template looked at the text) is not trusted: then the literals
are cut before rendering.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime
from enum import Enum, auto
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from epd.checkpoint import ImagePlaceholder, image_placeholder, read_json
from epd.errors import ConfigError, InvalidRequest
from proxy.text.tokenizer import Tokenizer
from proxy.text.user_text import Markers, Message, count_images, cut, map_strings, split_points, strings_of, with_tail
from proxy.tools.prompt import with_tools

Tool = dict[str, Any]
_Conversation = tuple[Sequence[Message], Sequence[Tool]]
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Ending(Enum):
    """What follows the last message."""

    HEADER = auto()
    """The header of the answer."""
    NOTHING = auto()
    """What the template writes behind a message that is complete."""
    OPEN = auto()
    """Nothing at all: the answer goes on with its text."""


class Prompt(msgspec.Struct, frozen=True):
    """A rendered and encoded conversation."""

    token_ids: tuple[int, ...]
    image_offsets: tuple[int, ...]
    """Index in `token_ids` of the one placeholder of each picture."""


class ChatTemplate:
    """Renders and encodes conversations of one model.

    Args:
        source: Jinja text.
        tokenizer: of the same model.
        special_tokens: variables such as `bos_token` that the template may read.
        image: the placeholder of a picture; None for a model that reads text only.
        tool_source: Jinja text for conversations with tools, where the checkpoint has one of its own for them.

    Raises:
        ConfigError: the template does not compile.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        image: ImagePlaceholder | None = None,
        tool_source: str | None = None,
    ) -> None:
        self._template = _compiled(source)
        self._tool_template = self._template if tool_source is None else _compiled(tool_source)
        self.tool_source = source if tool_source is None else tool_source
        """What says how tools are called."""
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens or {}
        self._image = image
        self._takes_lists = self._shows("probe", [{"type": "text", "text": "probe"}])
        self._takes_strings = self._shows("probe", "probe")
        self.takes_tools = self._shows_tools()
        """Whether the template has a place for tools. Else they are put into messages."""

    @classmethod
    def from_checkpoint(cls, model: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a checkpoint; None when it has none, so that only `/v1/completions` can be served."""
        source = _find_source(model)
        if source is None:
            return None
        return cls(
            source,
            tokenizer,
            special_tokens=_special_tokens(read_json(model, "tokenizer_config.json")),
            tool_source=_find_source(model, "tool_use"),
            image=image_placeholder(model),
        )

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Tool] = (),
        ending: Ending = Ending.HEADER,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        Args:
            messages: of the conversation.
            tools: that the model may call, as `{"type": "function", "function": …}`.
            ending: what follows.
            variables: switches of the template.

        Raises:
            InvalidRequest: the template refused the messages, a variable is none that requests may set, or the last
                message has no text to go on with, or none that the template shows.
        """
        if ending is not Ending.OPEN:
            return self._render(messages, tools, ending, variables)
        # The blank tells whether the template has trimmed the text: then that before the mark goes too.
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        text, found, behind = self._render(with_tail(messages, f"{mark} "), tools, ending, variables).rpartition(mark)
        if not found:
            raise InvalidRequest(
                "The model's chat template does not show the last message as it is; it can't be continued.",
                param="continue_final_message",
            )
        return text if behind.startswith(" ") else text.rstrip()

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool], ending: Ending, variables: dict[str, Any]
    ) -> str:
        if not self.takes_tools:
            messages, tools = with_tools(messages, tools), ()
        ours: dict[str, Any] = {
            **self._special_tokens,
            "messages": [self._adapt(message) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": ending is Ending.HEADER,
        }
        for name in variables.keys() & ours.keys():
            raise InvalidRequest(f"chat_template_kwargs.{name} can't be set.", param="chat_template_kwargs")
        try:
            template = self._tool_template if tools else self._template
            return template.render({**variables, **ours})
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refused the messages: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            # Templates are programs: what they do with odd messages is the request's fault, not ours.
            raise InvalidRequest(
                f"The model's chat template can't take these messages ({type(error).__name__}: {error}); "
                "check roles, their order and the content of each message.",
                param="messages",
            ) from error

    def encode(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Tool] = (),
        ending: Ending = Ending.HEADER,
        **variables: Any,
    ) -> Prompt:
        """Render and encode. Arguments are those of `render`.

        Raises:
            InvalidRequest: see `render`; or the prompt has not one placeholder for each picture.
        """

        def render(conversation: _Conversation) -> str:
            messages, tools = conversation
            return self.render(messages, tools=tools, ending=ending, **variables)

        pieces = map(self._with_borders, self.pieces((messages, tools), render))
        token_ids = tuple(chain.from_iterable(map(self._tokenizer.encode, pieces)))
        return Prompt(token_ids, self._image_offsets(token_ids, count_images(messages)))

    def pieces(self, conversation: _Conversation, render: Callable[[_Conversation], str]) -> list[str]:
        """What `render` makes of messages and tools, cut so that the tokens of the pieces hold no control token of
        users.

        Raises:
            InvalidRequest: what `render` raises, or a text that becomes a control token by itself.
        """
        strings = strings_of(conversation)
        plain = render(conversation)
        if any(map(self._tokenizer.hides_added_token, strings)):
            raise InvalidRequest("The text normalises to a control token of this model.", param="messages")
        if any(map(self._tokenizer.could_hold_added_token, strings)):
            return self._split_safely(conversation, plain, render)
        return [plain]

    def _with_borders(self, piece: str) -> str:
        """Add what belongs around placeholders. They are the template's own: users' literals have been cut in two."""
        if self._image is None or not self._image.border:
            return piece
        literal = str(self._tokenizer.backend.id_to_token(self._image.token_id))
        return piece.replace(literal, f"{self._image.border}{literal}{self._image.border}")

    def _image_offsets(self, token_ids: tuple[int, ...], images: int) -> tuple[int, ...]:
        if self._image is None:
            if images:
                raise InvalidRequest("This model reads text only; remove the images.", param="messages")
            return ()
        placeholders = token_ids.count(self._image.token_id)
        if placeholders != images:
            raise InvalidRequest(
                f"The chat template made {placeholders} image placeholders for {images} images; "
                "put images into user messages only.",
                param="messages",
            )
        if not images:
            return ()
        return tuple(index for index, token in enumerate(token_ids) if token == self._image.token_id)

    # -- who wrote what ------------------------------------------------------------------------------------------

    def _split_safely(
        self, conversation: _Conversation, plain: str, render: Callable[[_Conversation], str]
    ) -> list[str]:
        """`plain` in pieces, cut so that no added-token literal which user text takes part in survives."""
        markers = Markers()
        marked = render(map_strings(conversation, markers.wrap))
        text, spans = markers.strip(marked)
        if text == plain:
            return cut(text, split_points(self._tokenizer.find_added_tokens(text), spans))
        scissors = f"\ue000{secrets.token_hex(8)}\ue001"
        broken = map_strings(conversation, lambda string: self._break(string, scissors))
        return [piece for piece in render(broken).split(scissors) if piece]

    def _break(self, text: str, scissors: str) -> str:
        """`text` with `scissors` inside each literal, and at its ends, where it touches what the template writes."""
        found = self._tokenizer.find_added_tokens(text)
        points = split_points(found, [(0, len(text))])
        return scissors + scissors.join(cut(text, points)) + scissors if text else text

    # -- what the template can take ------------------------------------------------------------------------------

    def _shows(self, word: str, content: Any) -> bool:
        try:
            text = self._template.render(
                messages=[{"role": "user", "content": content}], add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return False
        return word in text and "{'type'" not in text

    def _shows_tools(self) -> bool:
        schema = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
        function = {"name": "probe_tool", "description": "probe", "parameters": schema}
        try:
            text = self._tool_template.render(
                messages=[self._adapt({"role": "user", "content": "probe"})],
                tools=[{"type": "function", "function": function}],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return False
        return "probe_tool" in text

    def _adapt(self, message: Message) -> Message:
        content = message.get("content")
        if isinstance(content, str) and not self._takes_strings and self._takes_lists:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not self._takes_lists:
            if any(part.get("type") != "text" for part in content):
                raise InvalidRequest("This model's chat template takes text only; remove the images.", param="messages")
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return message


# -- reading the checkpoint --------------------------------------------------------------------------------------


def _find_source(model: Path, name: str = "default") -> str | None:
    """One of the checkpoint's named templates."""
    file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
    if (path := model / file).is_file():
        return path.read_text(encoding="utf-8")
    for config in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(model, config).get("chat_template")
        if isinstance(found, str):
            return found if name == "default" else None
        if isinstance(found, list):
            template = {entry.get("name"): entry.get("template") for entry in found}.get(name)
            return template if isinstance(template, str) else None
    return None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


# -- Jinja ---------------------------------------------------------------------------------------------------------


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; when serving it is its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _compiled(source: str) -> jinja2.Template:
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template does not compile: {error}") from error
    template.globals = dict(template.globals)  # each rendering copies them, from a chain of dicts slowly
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
