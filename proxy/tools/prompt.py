"""Tools, calls and their results in prompts of models whose chat template has no place for them, such as Qwen2-VL's.

They are asked, in the system turn, for the format of Qwen2.5, and earlier calls are replayed in it. All that users
wrote goes through as it is: whoever renders the messages marks it before and finds it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from proxy.text.user_text import Message

_DEFAULT_SYSTEM = "You are a helpful assistant."
_BEFORE_TOOLS = """# Tools

You can call functions to help with what the user asks. Each line between <tools> and </tools> describes one, as JSON:
<tools>
"""
_AFTER_TOOLS = """
</tools>

To call a function, write a JSON object with its name and its arguments between <tool_call> and </tool_call>, and one \
such block for each call:
<tool_call>
{"name": "the function's name", "arguments": {"a parameter's name": "its value"}}
</tool_call>"""


def with_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Messages that any chat template can take, with the tools in the system turn and calls and results as text."""
    found = _replayed(messages)
    if not tools:
        return found
    block = _BEFORE_TOOLS + "\n".join(_json(tool) for tool in tools) + _AFTER_TOOLS
    if found and found[0]["role"] == "system":
        first, *rest = found
        return [{**first, "content": _joined(first.get("content") or "", "\n\n" + block)}, *rest]
    return [{"role": "system", "content": f"{_DEFAULT_SYSTEM}\n\n{block}"}, *found]


def _replayed(messages: Sequence[Message]) -> list[Message]:
    found: list[Message] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if follows_result:  # results of one turn are one turn
                found[-1]["content"] += "\n" + text
            else:
                found.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            found.append(_with_calls(message))
        else:
            found.append(message)
        follows_result = is_result
    return found


def _with_calls(message: Message) -> Message:
    content, calls = message.get("content") or "", "\n".join(_call(one["function"]) for one in message["tool_calls"])
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": _joined(content, ("\n" if content else "") + calls)}


def _call(function: dict[str, Any]) -> str:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else _json(arguments)
    return f'<tool_call>\n{{"name": {_json(function["name"])}, "arguments": {text}}}\n</tool_call>'


def _joined(content: Any, text: str) -> Any:
    return content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
