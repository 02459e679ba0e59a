"""What models write to what clients are told: each sample text, cut at every place, gives the same."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from proxy.tools.calls import CallDelta
from proxy.tools.parsers import CallParser, LlamaParser, MistralParser, QwenParser
from proxy.tools.reader import CallReader

Q, L, M = QwenParser, LlamaParser, MistralParser
Calls = list[tuple[str, str]]
TRICKY = '{"text": "a ] } ; </tool_call> [TOOL_CALLS] \\" \\\\", "list": [1, {"b": null}], "unit": "°C 北京 👩‍👩‍👧"}'


def qwen(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


F, G = call("f", '{"a": 1}'), call("g", TRICKY)
LF, LG = call("f", '{"a": 1}', "parameters"), call("g", TRICKY, "parameters")
ONE: Calls = [("f", '{"a": 1}')]
BOTH: Calls = [("f", '{"a": 1}'), ("g", TRICKY)]

SAMPLES: list[tuple[type[CallParser], str, str, Calls]] = [
    # qwen25
    (Q, "just text", "just text", []),
    (Q, "blanks stay \n\n", "blanks stay \n\n", []),
    (Q, "", "", []),
    (Q, qwen(F), "", ONE),
    (Q, qwen(F, G), "", BOTH),
    (Q, f"Let me look.\n\n{qwen(F)}\n", "Let me look.", ONE),
    (Q, f"{qwen(F)}\nand so on", "\nand so on", ONE),
    (Q, f"<tool_call>{F}</tool_call><tool_call>{G}</tool_call>", "", BOTH),
    (Q, f"<tool_call>\n{F}", "", ONE),  # unclosed, but all there
    (Q, f"<tool_call>\n{F[:-1]}\n</tool_call>", "", ONE),  # a brace too few
    (Q, f"<tool_call>\n{F}}}\n</tool_call> x", " x", ONE),  # and one too many
    (Q, f"<tool_call>\n{F}\n</tool_", "", ONE),
    (Q, "a <tool_cat> b <tool_call", "a <tool_cat> b <tool_call", []),
    (Q, "<tool_call>\nno JSON\n</tool_call>", "<tool_call>\nno JSON\n</tool_call>", []),
    (Q, "see \n<tool_call> ", "see \n<tool_call> ", []),
    (Q, f"<tool_call><tool_call>{F}</tool_call>", "<tool_call>", ONE),
    (Q, '<tool_call>{"arguments": {"a": 1}, "id": [2], "name": "f"}</tool_call>', "", ONE),
    (Q, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (Q, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (Q, '<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
    (Q, r'<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}</tool_call>', "", ONE),
    (Q, '<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>', "", [("f", '"Paris"')]),
    (Q, '<tool_call>{"name": "f", "arguments": [1, 2]}</tool_call>', "", [("f", "[1, 2]")]),
    (Q, '<tool_call>{"name": "f", "arguments": 12.5e3}</tool_call>', "", [("f", "12.5e3")]),
    (Q, '<tool_call>{"name": "f",\n "arguments": {\n"a": "x\ny\\n"}}', "", [("f", '{\n"a": "x\\u000ay\\n"}')]),
    (Q, '<tool_call>{"name": "\\u0066", "arguments": {"a": 1}}</tool_call>', "", ONE),
    (Q, '<tool_call>{"name": 7, "arguments": {}}', '<tool_call>{"name": 7, "arguments": {}}', []),
    (Q, '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    (Q, '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    (Q, '<tool_call>{"name": "f", "arguments": {"a": [1', '<tool_call>{"name": "f", "arguments": {"a": [1', []),
    (Q, '<tool_call>{"name": "f", "arguments": {"a": b}}', '<tool_call>{"name": "f", "arguments": {"a": b}}', []),
    (Q, '<tool_call>{"name": "f", "arguments": {"a": 1]}', '<tool_call>{"name": "f", "arguments": {"a": 1]}', []),
    (Q, f'<tool_call>{{"name": "f", "arguments": {{"a": 1\n</tool_call>{qwen(F)}',
     '<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>', ONE),
    # llama3
    (L, "just text; with {braces}", "just text; with {braces}", []),
    (L, LF, "", ONE),
    (L, f"\n{LF}", "", ONE),
    (L, F, "", ONE),
    (L, f"<|python_tag|>{LF}", "", ONE),
    (L, f"<|python_tag|>{LF}; {LG}", "", BOTH),
    (L, f"{LF};{LG}", "", BOTH),
    (L, f"{LF}\n{LG};", "", BOTH),
    (L, f"{LF}; <|python_tag|>{LG}", "", BOTH),
    (L, f"Sure. <|python_tag|>{LF}", "Sure.", ONE),
    (L, f"{LF}; and so on", "; and so on", ONE),
    (L, f'{LF}; {{"a": 1}}', '; {"a": 1}', ONE),
    (L, '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", ONE),
    (L, '{"parameters": {"a": 1}, "name": "f"}', "", ONE),
    (L, r'{"name": "f", "parameters": "{\"a\": 1}"}', "", ONE),
    (L, '{"name": "f", "parameters": null}', "", [("f", "{}")]),
    (L, '{"name": "Ann"}', '{"name": "Ann"}', []),
    (L, '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    (L, '{"temperature": {"name": 1}}', '{"temperature": {"name": 1}}', []),
    (L, ' {"na', ' {"na', []),
    (L, "  \n", "  \n", []),
    (L, "<|python_tag|>search.call(query='x')", "search.call(query='x')", []),
    (L, '<|python_tag|>{"name": "f"}', "", [("f", "{}")]),
    (L, '{"name": "f", "parameters": {"a": ', '{"name": "f", "parameters": {"a": ', []),
    # mistral, before v11
    (M, "just [TOOL text", "just [TOOL text", []),
    (M, f"[TOOL_CALLS][{F}]", "", ONE),
    (M, f"[TOOL_CALLS] [{F}, {G}]", "", BOTH),
    (M, f"Well.\n[TOOL_CALLS]\n[ {F} ,{G} ]\n", "Well.", BOTH),
    (M, f"[TOOL_CALLS][{F}, {G}", "", BOTH),
    (M, f"[TOOL_CALLS] {F}", "", ONE),
    (M, "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    (M, '[TOOL_CALLS][{"name": "f", "arguments": {"a"', '[TOOL_CALLS][{"name": "f", "arguments": {"a"', []),
    (M, f"[TOOL_CALLS][{F}, oops]", ", oops]", ONE),
    # mistral, v11 and later
    (M, '[TOOL_CALLS]f{"a": 1}', "", ONE),
    (M, f'[TOOL_CALLS]f{{"a": 1}}[TOOL_CALLS]g{TRICKY}', "", BOTH),
    (M, f'[TOOL_CALLS]f[ARGS]{{"a": 1}}[TOOL_CALLS] g[ARGS] {TRICKY}\n', "", BOTH),
    (M, '[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{"a": 1}', "", ONE),
    (M, '[TOOL_CALLS]f[CALL_ID]x[ARGS]{"a": 1} thanks', " thanks", ONE),
    (M, "[TOOL_CALLS] are a marker", "[TOOL_CALLS] are a marker", []),
    (M, "[TOOL_CALLS]f[AR", "[TOOL_CALLS]f[AR", []),
    (M, "[TOOL_CALLS]f[ARGS] none", "[TOOL_CALLS]f[ARGS] none", []),
    (M, "[TOOL_CALLS] (", "[TOOL_CALLS] (", []),
    (M, "[TOOL_CALLS]f[CALL_ID]" + 20 * "no id ", "[TOOL_CALLS]f[CALL_ID]" + 20 * "no id ", []),
    # blanks that do not end
    (Q, f"Look.{400 * ' '}{qwen(F)}{400 * ' '}", f"Look.{144 * ' '}{144 * ' '}", ONE),
    (Q, f"<tool_call>{F}{400 * ' '}</tool_call>", "", ONE),
    (L, 400 * " " + LF, 400 * " " + LF, []),
    (L, f"{LF};{400 * ' '}{LF}", f";{400 * ' '}{LF}", ONE),
]  # fmt: skip


def read(parser: CallParser, pieces: list[str]) -> tuple[str, str, Calls, list[CallDelta]]:
    """Content as streamed, content of the whole answer, whole calls, and all news of calls."""
    reader = CallReader(parser)
    news = [reader.push(piece) for piece in pieces] + [reader.finish()]
    told, whole = ("".join(pieces) for pieces in zip(*(one[:2] for one in news), strict=True))
    return told, whole, [(one.name, one.arguments) for one in reader.calls], [d for one in news for d in one[2]]


def check_deltas(deltas: list[CallDelta], calls: Calls) -> None:
    """Indices from 0 on, id and name once with the first of each, pieces that make the arguments."""
    built: dict[int, list[str]] = {}
    for delta in deltas:
        if delta.index not in built:
            assert delta.index == len(built)
            assert delta.id
            assert delta.name
            built[delta.index] = [delta.name, ""]
        else:
            assert (delta.id, delta.name) == (None, None)
        built[delta.index][1] += delta.arguments
    assert all((name, arguments) in [tuple(one) for one in built.values()] for name, arguments in calls)


@pytest.mark.parametrize(("kind", "text", "content", "calls"), SAMPLES)
def test_every_cut_tells_the_same(kind: type[CallParser], text: str, content: str, calls: Calls) -> None:
    whole = read(kind(), [text])
    assert whole[1:3] == (content, calls)
    for cut in range(len(text) + 1):
        told, *rest, deltas = read(kind(), [text[:cut], text[cut:]])
        assert (told, *rest) == whole[:3], cut
        check_deltas(deltas, calls)
    told, *rest, deltas = read(kind(), list(text))
    assert (told, *rest) == whole[:3]
    check_deltas(deltas, calls)
    for _, arguments in calls:
        json.loads(arguments)


@pytest.mark.parametrize("text", [qwen(F), LF, f"[TOOL_CALLS][{F}]", '[TOOL_CALLS]f{"a": 1}'])
def test_what_is_known_is_told_at_once(text: str) -> None:
    """The name before the arguments, and the arguments letter by letter."""
    parsers: dict[str, CallParser] = {"<": QwenParser(), "{": LlamaParser(), "[": MistralParser()}
    *_, deltas = read(parsers[text[0]], list(text))
    assert "".join(delta.arguments for delta in deltas) == '{"a": 1}'
    assert len(deltas) > len('{"a": 1}')
    assert (deltas[0].name, deltas[0].arguments) == ("f", "")


@pytest.mark.parametrize(
    ("kind", "begin"), [(Q, ""), (Q, f"<tool_call>{F}</tool_call>"), (L, ""), (L, LF), (M, ""), (M, "[TOOL_CALLS]f{}")]
)
def test_blanks_without_end_are_told_as_they_come(kind: type[CallParser], begin: str) -> None:
    """What is held back is looked at again with each token."""
    parser = kind()
    parser.push(begin)
    assert not parser.push(200 * "\n")
    told = "".join(piece for piece in parser.push(2000 * "\n") if isinstance(piece, str))
    assert len(told) >= 1900


def test_ids_differ_and_look_as_they_should() -> None:
    *_, deltas = read(QwenParser(), [qwen(*[F] * 20)])
    ids = {delta.id for delta in deltas if delta.id}
    assert len(ids) == 20
    assert all(one.startswith("call_") for one in ids)
    *_, deltas = read(MistralParser(), [f"[TOOL_CALLS][{F}]", "[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{}"])
    first, second = (delta.id for delta in deltas if delta.id)
    assert first is not None
    assert len(first) == 9
    assert first.isalnum()
    assert second == "abcDEF123"


@pytest.mark.parametrize(
    ("kind", "text"),
    [(Q, f"Hm. {qwen(F, G)} x"), (L, f"{LF}; {LG}"), (M, f"[TOOL_CALLS][{F}, {G}]"),
     (M, "[TOOL_CALLS]f{}[TOOL_CALLS]g{}")],
)  # fmt: skip
def test_the_first_call_alone_when_one_is_wanted(kind: type[CallParser], text: str) -> None:
    for cut in range(len(text)):
        parser = kind(1)
        _, content, calls, deltas = read(parser, [text[:cut], text[cut:]])
        assert parser.is_over
        assert [name for name, _ in calls] == ["f"]
        assert content in ("", "Hm.")
        assert {delta.index for delta in deltas} == {0}
    parser = kind(1)
    cuts = [len(text[:at]) for at in range(len(text) + 1)]
    over = [parser.push(text[low:high]) is not None and parser.is_over for low, high in pairwise(cuts)]
    assert over.index(True) < len(text) - 5  # at the end of the first, not at the end of all


COMMON = ["\n", "; ", ", ", "text", ":", "{", "}", "[", "]", '"', "\\", '{"name": "f"', '{"a": "]"}', "null", F]
FRAGMENTS = {
    Q: [*COMMON, Q.opener, "</tool_call>", ', "arguments"', "<tool_", G],
    L: [*COMMON, L.opener, ', "parameters"', "<|pyt", LF, LG],
    M: [*COMMON, M.opener, "[ARGS]", "[CALL_ID]", "abcDEF123", "[TOO"],
}


@pytest.mark.parametrize("kind", [Q, L, M])
def test_what_no_model_would_write_is_told_the_same_however_it_is_cut_and_nothing_is_lost(
    kind: type[CallParser],
) -> None:
    rng = random.Random(20)
    for _ in range(1500):
        text = "".join(rng.choices(FRAGMENTS[kind], k=rng.randint(1, 8)))
        cuts = sorted({0, len(text), *(rng.randint(0, len(text)) for _ in range(4))})
        whole = read(kind(), [text])
        assert read(kind(), [text[low:high] for low, high in pairwise(cuts)])[:3] == whole[:3], text
        assert read(kind(), list(text))[:3] == whole[:3], text
        if not whole[2] and L.opener not in text:
            assert whole[1] == text
