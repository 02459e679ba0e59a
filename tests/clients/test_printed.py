"""The clients that the five documents print, run as they are printed: address, model and the file's path apart.

Python is run by Python and `curl` by bash, where there is a curl; elsewhere its method, header lines and body are sent
by `printed_curl`. The model behind `lightllm_native/get_score.py` is another one: see tests/cluster/test_tasks.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epd.demo import GALLERY_DIR
from tests.clients.asking import MODEL
from tests.cluster.harness import Cluster

DOCUMENTS = Path(__file__).parent / "documents"
ELSEWHERE = "lightllm_native/get_score.py"
SNIPPETS = sorted({str(path.relative_to(DOCUMENTS)) for path in DOCUMENTS.glob("*/*")} - {ELSEWHERE})
ADDRESSES = (
    *("{server_name}:{server_port}", "0.0.0.0:8080", "localhost:8080", "localhost:8088", "localhost:8000"),
    *("127.0.0.1:5580", "host:port"),
)
MODELS = ("internlm-chat-7b", "your_model_name", "qwen2", "llama3", "/workspace/models/Qwen2.5-VL-7B-Instruct")
PICTURE = "/workspace/l00807937/EPD_Timecount_v0.11.0/image/work.jpg"

WORDS, CALL = "回复:", "模型决定调用函数:"
"""What document 002's client prints before an answer in words, and before calls."""


def printed_curl(line: str) -> str:
    """What `curl` prints, for the options that the documents use."""
    words = shlex.split(line.replace("\\\n", " "))[1:]
    url, method, body, headers = "", None, None, {}
    while words:
        word = words.pop(0)
        if word == "-X":
            method = words.pop(0)
        elif word == "-H":
            name, _, value = words.pop(0).partition(":")
            headers[name] = value.strip()
        elif word == "-d":
            body = words.pop(0).encode()
        else:
            url = word
    with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=60) as response:
        return str(response.read().decode())


def run(cluster: Cluster, name: str, *others: tuple[str, str]) -> str:
    """What a snippet prints, with what stands for the server, its model and more replaced."""
    text = (DOCUMENTS / name).read_text()
    changes = [(address, f"127.0.0.1:{cluster.port}") for address in ADDRESSES]
    changes += [(f'"{model}"', f'"{MODEL}"') for model in MODELS]
    for old, new in (*changes, *others):
        text = text.replace(old, new)
    if name.endswith(".sh") and not shutil.which("curl"):
        return printed_curl(text.partition("\n")[2])
    command = [sys.executable, "-c", text] if name.endswith(".py") else ["bash", "-c", text]
    environment = os.environ | {"no_proxy": "*", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, encoding="utf-8")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def native_frames(printed: str) -> list[Any]:
    return [json.loads(event.removeprefix("data:")) for event in printed.split("\n\n")[:-1]]


def check_chat(printed: str) -> None:
    body = json.loads(printed)
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"]


def check_completion(printed: str) -> None:
    body = json.loads(printed)
    assert (body["object"], body["choices"][0]["index"]) == ("text_completion", 0)
    assert isinstance(body["choices"][0]["text"], str)
    assert body["usage"]["completion_tokens"] <= 128


def check_generated(printed: str) -> None:
    body = json.loads(printed)
    assert list(body)[:3] == ["generated_text", "model", "tokens"]
    assert body["model"] == MODEL


def check_words(printed: str) -> None:
    assert printed.startswith((WORDS, CALL)), printed


def check_streamed_words(printed: str) -> None:
    assert printed
    assert "错误" not in printed


def check_models(printed: str) -> None:
    assert [card["id"] for card in json.loads(printed)["data"]] == [MODEL]


def check_turn(printed: str) -> None:
    assert json.loads(printed)["finish_reason"] == "stop"


def check_health(printed: str) -> None:
    assert json.loads(printed)["message"] == "Ok"


def check_load(printed: str) -> None:
    assert list(json.loads(printed)) == ["current_load", "logical_max_load", "dynamic_max_load"]


def check_vector(printed: str) -> None:
    assert len(json.loads(printed)["data"][0]["embedding"]) > 10


def check_native(printed: str) -> None:
    body = json.loads(printed)
    assert list(body) == ["generated_text", "count_output_tokens", "finish_reason", "prompt_tokens"]


def check_native_stream(printed: str) -> None:
    frames = native_frames(printed)
    assert [frame["token"]["count_output_tokens"] for frame in frames] == list(range(1, len(frames) + 1))
    assert frames[-1]["finished"]


def check_document(printed: str) -> None:
    assert "/v1/chat/completions" in json.loads(printed)["paths"]


def check_page(printed: str) -> None:
    assert "<html" in printed


CHECKS: dict[str, Callable[[str], None]] = {
    "epd/chat.sh": check_chat,
    "epd/completions.sh": check_completion,
    "epd/docs.sh": check_page,
    "epd/oauth2_redirect.sh": check_page,
    "epd/openapi.sh": check_document,
    "epd/redoc.sh": check_page,
    "lightllm_native/generate.sh": check_native,
    "lightllm_native/generate_stream.sh": check_native_stream,
    "lightllm_native/health.sh": check_health,
    "lightllm_native/token_load.sh": check_load,
    "lightllm_openai/chat.py": check_words,
    "lightllm_openai/chat_stream.py": check_streamed_words,
    "lightllm_openai/tools.py": check_words,
    "lightllm_openai/tools_stream.py": check_streamed_words,
    "lmdeploy/chat.sh": check_chat,
    "lmdeploy/embeddings.sh": check_vector,
    "lmdeploy/generate.py": check_streamed_words,
    "lmdeploy/generate.sh": check_turn,
    "lmdeploy/models.sh": check_models,
    "unified/base.sh": check_generated,
    "unified/qa.sh": check_generated,
    "unified/rewrite.sh": check_generated,
    "unified/summarize.sh": check_generated,
}


@pytest.fixture
def picture(media_folder: Path) -> tuple[str, str]:
    """The path of document 004's picture, and of one that is there."""
    return PICTURE, str(shutil.copy(GALLERY_DIR / "shape.png", media_folder / "work.jpg"))


@pytest.mark.parametrize("name", SNIPPETS)
def test_as_printed(demo: Cluster, name: str, picture: tuple[str, str]) -> None:
    CHECKS[name](run(demo, name, picture))


def test_the_streams_say_what_whole_answers_say(demo: Cluster) -> None:
    whole = json.loads(run(demo, "lightllm_native/generate.sh"))
    frames = native_frames(run(demo, "lightllm_native/generate_stream.sh"))
    assert ["".join(frame["token"]["text"] for frame in frames)] == whole["generated_text"]
    assert len(frames) == whole["count_output_tokens"]
    assert frames[-1]["finish_reason"] == whole["finish_reason"]


def test_the_printed_readers_of_calls_find_some(demo: Cluster) -> None:
    """The demo model calls nothing of its own accord, and would go on with a text for ever."""
    forced = (
        ('"tool_choice": "auto"', '"tool_choice": "required", "parallel_tool_calls": False'),
        ('"type": "string",', '"type": "string", "maxLength": 8,'),
    )
    printed = run(demo, "lightllm_openai/tools.py", *forced)
    assert printed.startswith(f"{CALL}\n函数名: get_current_weather\n参数: "), printed
    assert "[函数调用: calculate]" in run(demo, "lightllm_openai/tools_stream.py", *forced)


def test_without_curl(demo: Cluster, monkeypatch: pytest.MonkeyPatch, picture: tuple[str, str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for name in ("lmdeploy/models.sh", "unified/qa.sh", "epd/chat.sh"):
        CHECKS[name](run(demo, name, picture))
