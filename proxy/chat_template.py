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
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from epd.checkpoint import ImagePlaceholder, image_placeholder, read_json
from epd.errors import ConfigError, InvalidRequest
from proxy.tokenizer import Tokenizer

Message = dict[str, Any]
"""`role`, `content` (str, None or a list of parts {"type": "text", "text": …} | {"type": "image"}), and what else."""

_NOT_USER_TEXT = frozenset({"role", "type"})
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Prompt:
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
    ) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not compile: {error}") from error
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens or {}
        self._image = image
        self._takes_lists = self._shows("probe", [{"type": "text", "text": "probe"}])
        self._takes_strings = self._shows("probe", "probe")

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
            image=image_placeholder(model),
        )

    def render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """The conversation as text, with the header of the answer at its end.

        Raises:
            InvalidRequest: the template refused the messages, or a variable is none that requests may set.
        """
        ours: dict[str, Any] = {
            **self._special_tokens,
            "messages": [self._adapt(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        for name in variables.keys() & ours.keys():
            raise InvalidRequest(f"chat_template_kwargs.{name} can't be set.", param="chat_template_kwargs")
        try:
            return self._template.render({**variables, **ours})
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

    def encode(self, messages: Sequence[Message], /, **variables: Any) -> Prompt:
        """Render and encode.

        Raises:
            InvalidRequest: the template refused the messages, or the prompt has not one placeholder for each picture.
        """
        strings = _strings(messages)
        plain = self.render(messages, **variables)
        if any(self._tokenizer.hides_added_token(text) for text in strings):
            raise InvalidRequest("The text normalises to a control token of this model.", param="messages")
        if any(self._tokenizer.could_hold_added_token(text) for text in strings):
            pieces = self._split_safely(messages, plain, variables)
        else:
            pieces = [plain]
        token_ids = tuple(token for piece in pieces for token in self._tokenizer.encode(self._with_borders(piece)))
        return Prompt(token_ids, self._image_offsets(token_ids, _count_images(messages)))

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
        offsets = tuple(index for index, token in enumerate(token_ids) if token == self._image.token_id)
        if len(offsets) != images:
            raise InvalidRequest(
                f"The chat template made {len(offsets)} image placeholders for {images} images; "
                "put images into user messages only.",
                param="messages",
            )
        return offsets

    # -- who wrote what ------------------------------------------------------------------------------------------

    def _split_safely(self, messages: Sequence[Message], plain: str, variables: dict[str, Any]) -> list[str]:
        """`plain` in pieces, cut so that no added-token literal which user text takes part in survives."""
        markers = _Markers()
        marked = self.render(_map_strings(messages, markers.wrap), **variables)
        text, spans = markers.strip(marked)
        if text == plain:
            return _cut(text, _split_points(self._tokenizer.find_added_tokens(text), spans))
        scissors = f"\ue000{secrets.token_hex(8)}\ue001"
        broken = _map_strings(messages, lambda string: self._break(string, scissors))
        return [piece for piece in self.render(broken, **variables).split(scissors) if piece]

    def _break(self, text: str, scissors: str) -> str:
        """`text` with `scissors` inside each literal, and at its ends, where it touches what the template writes."""
        found = self._tokenizer.find_added_tokens(text)
        points = _split_points(found, [(0, len(text))])
        return scissors + scissors.join(_cut(text, points)) + scissors if text else text

    # -- what the template can take ------------------------------------------------------------------------------

    def _shows(self, word: str, content: Any) -> bool:
        try:
            text = self._template.render(
                messages=[{"role": "user", "content": content}], add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return False
        return word in text and "{'type'" not in text

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


def _find_source(model: Path) -> str | None:
    path = model / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(model, name).get("chat_template")
        if isinstance(found, str):
            return found
        if isinstance(found, list):  # several named ones
            named = {entry.get("name"): entry.get("template") for entry in found}
            default = named.get("default")
            return default if isinstance(default, str) else None
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


# -- strings of a conversation ---------------------------------------------------------------------------------------


def _map_strings(value: Any, change: Callable[[str], str], key: str | None = None) -> Any:
    """A copy of `value` with every string changed, except roles, types and the keys themselves."""
    if isinstance(value, str):
        return value if key in _NOT_USER_TEXT else change(value)
    if isinstance(value, dict):
        return {name: _map_strings(item, change, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change, key) for item in value]
    return value


def _strings(messages: Sequence[Message]) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _map_strings(messages, note)
    return found


def _count_images(messages: Sequence[Message]) -> int:
    contents = (message.get("content") for message in messages)
    return sum(part.get("type") == "image" for content in contents if isinstance(content, list) for part in content)


class _Markers:
    """Unguessable, numbered marks around user strings, made of private-use characters that no template cares about."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)
        self._pattern = re.compile(f"\ue000{self._nonce}(\\d+)([<>])")
        self._cores: list[str] = []

    def wrap(self, text: str) -> str:
        """Marks go inside the outer blanks, so that a template's `trim` still sees them."""
        core = text.strip()
        if not core:
            return text
        start, number = text.index(core), len(self._cores)
        self._cores.append(core)
        before, after = text[:start], text[start + len(core) :]
        return f"{before}\ue000{self._nonce}{number}<{core}\ue000{self._nonce}{number}>{after}"

    def strip(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Text without marks, and half-open spans of user text in it.

        Where a template cut one mark of a pair away, the span is as long as the text agrees with the user's string.
        """
        clean, spans = "", []
        opened: tuple[int, int] | None = None  # (number, position in `clean`)
        end = 0
        for match in self._pattern.finditer(text):
            clean += text[end : match.start()]
            end = match.end()
            number, is_open = int(match[1]), match[2] == "<"
            if opened is not None and (is_open or opened[0] != number):
                spans.append(self._span_after(clean, *opened))
                opened = None
            if is_open:
                opened = (number, len(clean))
            elif opened is not None:
                spans.append((opened[1], len(clean)))
                opened = None
            else:
                spans.append(self._span_before(clean, number))
        clean += text[end:]
        if opened is not None:
            spans.append(self._span_after(clean, *opened))
        return clean, spans

    def _span_after(self, clean: str, number: int, start: int) -> tuple[int, int]:
        return start, start + _shared_length(clean[start:], self._cores[number])

    def _span_before(self, clean: str, number: int) -> tuple[int, int]:
        core = self._cores[number]
        return len(clean) - _shared_length(clean[-len(core) :][::-1], core[::-1]), len(clean)


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _split_points(found: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """A point strictly inside each literal that overlaps a span, within the span where that is possible.

    Args:
        found: half-open, by start.
        spans: half-open, by start, not overlapping.
    """
    points, first = set(), 0
    for start, end in found:
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        for span_start, span_end in islice(spans, first, None):
            if span_start >= end:
                break
            low, high = max(start, span_start), min(end, span_end)
            points.add(min(max((low + high) // 2, start + 1), end - 1))
    return sorted(points)


def _cut(text: str, points: list[int]) -> list[str]:
    borders = [0, *points, len(text)]
    return [text[low:high] for low, high in pairwise(borders) if low < high]
