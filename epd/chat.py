"""`epd chat`: ask a running cluster with the openai client, stream the answer, say where the time went."""

from __future__ import annotations

import base64
import mimetypes
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from epd.access_options import API_KEY_VARIABLE
from epd.credentials import Credentials
from epd.errors import ConfigError

if TYPE_CHECKING:
    import openai

STAGES = (
    ("queue", "waiting for a place"),
    ("encode", "decoding, resizing and the vision tower"),
    ("transfer", "embeddings to the prefill-decode worker"),
    ("prefill", "prompt"),
    ("first_token", "until the first token, all of the above"),
    ("decode", "the other tokens"),
    ("total", "until the last token"),
)
"""Keys of `timings` in an answer, in the order of their happening, and what they mean."""


@dataclass(frozen=True, kw_only=True)
class ChatQuestion:
    """One question to a cluster."""

    question: str
    image: list[Path] = field(default_factory=list)
    url: str
    """Of a proxy, with or without `/v1`."""
    model: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    credentials: Credentials = Credentials()

    @property
    def base_url(self) -> str:
        """What OpenAI's clients take."""
        is_bare = urlsplit(self.url).path in ("", "/")
        return self.url.rstrip("/") + "/v1" if is_bare else self.url


def ask_and_print(question: ChatQuestion) -> int:
    """Print the answer as it comes, then the times. Returns the exit code."""
    openai = import_openai()
    http = openai.DefaultHttpxClient(verify=question.credentials.tls())
    key = question.credentials.api_key
    printed = _Printed()
    try:
        with openai.OpenAI(
            base_url=question.base_url, api_key=key or "none", max_retries=0, http_client=http
        ) as client:
            timings = _print_answer(client, question.model or _first_model(client, question), question, printed)
    except openai.APIConnectionError as error:
        if printed.anything:
            print(f"{printed.end}epd: the connection ended before the answer did", file=sys.stderr)
            return 1
        cause = _first_cause(error)
        if isinstance(cause, ssl.SSLError):
            raise ConfigError(f"{question.url}: {cause}; --ca-file FILE names who signed its certificate") from error
        raise ConfigError(f"no cluster answers at {question.url}: start one with `epd up`, or give --url") from error
    except openai.AuthenticationError as error:
        # Without one, the client sends a word of its own, which the server calls wrong.
        wanted = f"{question.url} wants an API key: give --api-key, or set {API_KEY_VARIABLE}"
        print(f"epd: {error.message if key else wanted}", file=sys.stderr)
        return 1
    except openai.APIError as error:
        print(f"{printed.end}epd: {error.message}", file=sys.stderr)
        return 1
    print(f"\n\n{format_timings(timings)}")
    return 0


def _first_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def import_openai() -> Any:
    """The openai package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import openai  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ConfigError("this command needs the openai client: pip install 'epd[client]'") from error
    return openai


@dataclass
class _Printed:
    """Whether some of the answer is on the screen."""

    anything: bool = False

    @property
    def end(self) -> str:
        """What goes in front of another line."""
        return "\n" if self.anything else ""


def _first_model(client: openai.OpenAI, question: ChatQuestion) -> str:
    try:
        models = client.models.list().data
    except (AttributeError, ValueError) as error:  # the client does not look at what it was sent
        raise ConfigError(f"{question.url} is no server that speaks OpenAI's API; give another --url") from error
    if not models:
        raise ConfigError(f"{question.url} serves no model yet; `epd status` tells which workers it has")
    return models[0].id


def _print_answer(client: openai.OpenAI, model: str, question: ChatQuestion, printed: _Printed) -> Mapping[str, float]:
    timings: Mapping[str, float] = {}
    # The client's types know neither a list of plain dicts nor our extra fields.
    create: Any = client.chat.completions.create
    stream = create(
        model=model,
        messages=[{"role": "user", "content": user_content(question.question, question.image)}],
        max_tokens=question.max_tokens,
        temperature=question.temperature,
        stream=True,
        extra_body={"timings": True},
    )
    for chunk in stream:
        if chunk.choices:
            text = chunk.choices[0].delta.content or ""
            print(text, end="", flush=True)
            printed.anything |= bool(text)
        timings = getattr(chunk, "timings", None) or timings
    return timings


def user_content(question: str, images: list[Path]) -> list[dict[str, Any]]:
    """The content of a user message: pictures first, each as a data: URL, then the text.

    Raises:
        ConfigError: a file can't be read.
    """
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [*parts, {"type": "text", "text": question}]


def data_url(image: Path) -> str:
    """The file as a data: URL (RFC 2397).

    Raises:
        ConfigError: it can't be read.
    """
    try:
        content = image.read_bytes()
    except OSError as error:
        raise ConfigError(f"--image {image}: {error.strerror}") from error
    media_type = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def format_timings(timings: Mapping[str, float]) -> str:
    """A table of stage times, one line a stage, in milliseconds."""
    lines = [f"  {name:<12}{timings[name]:>9.1f} ms  {meaning}" for name, meaning in STAGES if name in timings]
    return "\n".join(lines) if lines else "  (the server sent no timings)"


def format_timings_short(timings: Mapping[str, float]) -> str:
    """The same on one line."""
    return "  ".join(f"{name} {timings[name]:.0f}" for name, _ in STAGES if name in timings) + " ms"
