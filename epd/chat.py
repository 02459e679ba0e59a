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
    model: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    credentials: Credentials = Credentials()


def ask_and_print(question: ChatQuestion) -> int:
    """Print the answer as it comes, then the times. Returns the exit code."""
    openai = import_openai()
    http = openai.DefaultHttpxClient(verify=question.credentials.tls())
    key = question.credentials.api_key or "none"
    try:
        with openai.OpenAI(base_url=question.url, api_key=key, max_retries=0, http_client=http) as client:
            model = question.model or client.models.list().data[0].id
            timings = _print_answer(client, model, question)
    except openai.APIConnectionError as error:
        reason = f" ({cause})" if isinstance(cause := _first_cause(error), ssl.SSLError) else ""
        raise ConfigError(
            f"no cluster answers at {question.url}{reason}: start one with `epd up`, or give --url"
        ) from error
    except openai.APIError as error:
        print(f"epd: {error.message}", file=sys.stderr)
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


def _print_answer(client: openai.OpenAI, model: str, question: ChatQuestion) -> Mapping[str, float]:
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
            print(chunk.choices[0].delta.content or "", end="", flush=True)
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
