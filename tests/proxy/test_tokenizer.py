"""Tokens to text in pieces, and stop strings across pieces."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers
from tokenizers.decoders import DecodeStream

from epd.errors import ConfigError
from proxy.text.tokenizer import Detokenizer, StopChecker, Tokenizer

TEXTS = ["hello world", "a 👩‍👩‍👧‍👦 b", "日本語のテキスト", "e\u0301 ñ ü", "🇩🇪🏳️‍🌈", "tab\tnl\n\n  x", "\u200b\u202eabc"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokenizer(tokenizer)
    pieces = [stream.push([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_cut_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    assert stream.push(tokenizer.encode("a日")[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@pytest.mark.parametrize("skip", [True, False])
def test_bytes_give_what_the_library_gives(tokenizer: Tokenizer, skip: bool) -> None:
    """Any order of tokens, broken characters, added tokens and ids without a token included."""
    table, source = tokenizer.bytes, random.Random(2)
    assert table is not None
    whole = tokenizer.encode("".join(TEXTS)) + sorted(tokenizer.special_ids) + [tokenizer.vocab_size + 7]
    for _ in range(300):
        token_ids = source.choices(whole, k=20) + source.choices(range(tokenizer.vocab_size), k=10)
        source.shuffle(token_ids)
        ours, library = Detokenizer(tokenizer, skip_special_tokens=skip), DecodeStream(skip_special_tokens=skip)
        sent, known = "", ""
        for token in token_ids:
            sent, known = sent + ours.push([token]), known + (library.step(tokenizer.backend, token) or "")
            assert sent.startswith(known)  # the library waits for a whole character behind broken ones, too
        whole_text = tokenizer.decode(token_ids, skip_special_tokens=skip)
        assert sent + ours.flush() == whole_text
        fresh = Detokenizer(tokenizer, skip_special_tokens=skip)
        assert fresh.push(token_ids) + fresh.flush() == whole_text


@pytest.fixture
def threads_change_where_they_let_go_alone() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("threads_change_where_they_let_go_alone")
@pytest.mark.parametrize(
    "work",
    [
        lambda one, text: one.encode(text),
        lambda one, text: one.encode_pair("Hello!", text),
        lambda one, text: one.decode([5] * len(text)),
    ],
    ids=["encode", "encode_pair", "decode"],
)
def test_others_go_on_beside_long_texts(tokenizer: Tokenizer, work: Callable[[Tokenizer, str], object]) -> None:
    """The event loop is one of them."""
    go, has_run = threading.Event(), threading.Event()

    def wait_and_run() -> None:
        go.wait()
        has_run.set()

    other = threading.Thread(target=wait_and_run)
    other.start()
    text = "hello world " * 20_000
    go.set()
    for _ in range(20):  # a busy host may let it wait
        work(tokenizer, text)
        if has_run.is_set():
            break
    assert has_run.is_set()
    other.join()


def test_long_texts_have_the_tokens_of_their_pieces(tokenizer: Tokenizer) -> None:
    lines = [f"{text}\n" for text in TEXTS] * 100
    whole = tokenizer.encode("".join(lines), add_special_tokens=True)
    assert whole == tokenizer.backend.encode("".join(lines), add_special_tokens=True).ids
    assert tokenizer.decode(whole) == tokenizer.backend.decode(whole) == "".join(lines)
    pair = tokenizer.backend.encode("a", "".join(lines)).ids
    assert tokenizer.encode_pair("a", "".join(lines)) == pair


def byte_fallback(folder: Path) -> Tokenizer:
    """A tokenizer of the Llama kind: characters that it does not know are bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "<unk>": 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


def test_broken_bytes_after_sent_ones_end_no_answer(tmp_path: Path) -> None:
    """A decoder of that kind shows a newline before a broken byte as broken, too; it was sent already."""
    stream = Detokenizer(byte_fallback(tmp_path))
    assert [stream.push([token]) for token in (258, 0x0A, 0x81, 258, 257)] == ["a", "\n", "", "\ufffd a", "a"]


def test_broken_bytes_do_not_wait_for_the_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A model can write them as long as it likes."""
    assert tokenizer.bytes is not None
    broken = next(token for token in range(tokenizer.vocab_size) if tokenizer.bytes.raw(token) == b"\xff")
    stream = Detokenizer(tokenizer)
    assert [stream.push([token]) for token in (broken, broken, *tokenizer.encode("\ufffd"))] == [
        *"\ufffd\ufffd",
        "",
        "",
        "\ufffd",
    ]
    stream = Detokenizer(byte_fallback(tmp_path))
    assert stream.push([257] + [0xFF] * 40 + [258]) + stream.flush() == "a" + 40 * "\ufffd" + " a"
    assert "\ufffd" in stream.push([0xFF] * 40)
    assert stream.push([258]) == (40 - 32) * "\ufffd" + " a"


def test_no_order_of_tokens_is_an_error(tmp_path: Path) -> None:
    tokenizer, source = byte_fallback(tmp_path), random.Random(0)
    for _ in range(300):
        token_ids = [source.choice((source.randrange(256), 256, 257, 258)) for _ in range(12)]
        stream = Detokenizer(tokenizer)
        text = stream.push(token_ids) + stream.flush()
        assert text.count("a") >= sum(token in (257, 258) for token in token_ids)


@pytest.mark.parametrize(("skip", "wanted"), [(True, "ab<think>"), (False, "a<|im_end|>b<think>")])
def test_special_tokens_are_skipped_on_demand(tokenizer: Tokenizer, skip: bool, wanted: str) -> None:
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    assert stream.push(tokenizer.encode("a<|im_end|>b<think>")) + stream.flush() == wanted


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "matched"),
    [
        (["hel", "lo wo", "rld"], ["lo w"], "hel", "lo w"),
        (["abc"], ["x"], "abc", None),
        (["ab", "ab", "ac"], ["abac"], "ab", "abac"),
        (["a", "b"], ["abc"], "ab", None),  # held back, flushed at the end
        (["one two"], ["two", "one"], "", "one"),  # the earliest wins
        (["stop here"], ["stop", "stop here"], "", "stop"),
        (["xxEND"], ["EN", "END"], "xx", "EN"),
        (["ab", "cd"], ["bcd", "abcd"], "", "abcd"),
        (["日", "本"], ["本"], "日", "本"),
        (["aaa", "aab"], ["aab"], "aaa", "aab"),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], text: str, matched: str | None) -> None:
    checker = StopChecker(stops)
    assert "".join(checker.push(piece) for piece in pieces) + checker.flush() == text
    assert checker.matched == matched


def test_stops_do_not_depend_on_how_text_is_cut() -> None:
    source = random.Random(1)
    for _ in range(500):
        text = "".join(source.choices("abc", k=30))
        stops = ["".join(source.choices("abc", k=source.randint(1, 5))) for _ in range(3)]
        answers = set()
        for size in (1, 2, 3, 7, 30):
            checker = StopChecker(stops)
            out = "".join(checker.push(text[i : i + size]) for i in range(0, 30, size)) + checker.flush()
            answers.add((out, checker.matched))
        assert len(answers) == 1, (text, stops, answers)


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    checker = StopChecker(["</end>"])
    assert [checker.push(char) for char in "x</en!"] == ["x", "", "", "", "", "</en!"]


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_broken_tokenizer_is_a_config_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("plain", False),
        ("<Tool>", False),  # verbatim: found and cut by others
        ("<tool>", True),
        ("<Tool> <tool>", True),  # the verbatim one is no excuse for the other
        ("\uff1ctool\uff1e", True),
    ],
)
def test_literals_that_normalisation_makes(tmp_path: Path, text: str, hidden: bool) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.add_tokens([tokenizers.AddedToken("<Tool>", normalized=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.hides_added_token(text) is hidden
    assert not hidden or tokenizer.token_id("<Tool>") in tokenizer.encode(text)


def test_an_answer_that_goes_on_keeps_its_blank(tmp_path: Path) -> None:
    tokenizer = byte_fallback(tmp_path)
    assert Detokenizer(tokenizer).push([258, 257]) == "aa"
    assert Detokenizer(tokenizer, context=[257]).push([258, 257]) == " aa"


@pytest.mark.parametrize("text", TEXTS)
def test_any_context_gives_the_rest_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    """One that ends within a character does no harm."""
    token_ids = tokenizer.encode(text)
    for cut in range(1, len(token_ids)):
        stream = Detokenizer(tokenizer, context=token_ids[:cut])
        rest = stream.push(token_ids[cut:]) + stream.flush()
        before = tokenizer.decode(token_ids[:cut])
        if before.endswith("\ufffd"):
            fresh = Detokenizer(tokenizer)
            assert rest == fresh.push(token_ids[cut:]) + fresh.flush()
        else:
            assert before + rest == text
