"""The matcher over vocabularies as checkpoints have them: byte-level, byte fallback, padded, cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from epd.types import Grammar, GrammarKind
from workers.engine import grammar as grammar_module
from workers.engine.grammar import GrammarCompiler, GrammarMatcher

TEXTS = ['the quick brown fox 12 größer 漢字 \n\t {}[]":,.'] * 3
EOS = "</s>"
NO_ENDS = np.empty(0, dtype=np.int64)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: pieces with ▁ for blanks, and <0x..> for what has no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz0123456789", "▁t"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "t")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.fixture(params=[byte_level, byte_fallback], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    made.add_special_tokens([AddedToken(EOS, special=True), AddedToken("<image>", special=True)])
    return made


def id_of(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    assert index is not None
    return int(index)


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make(tokenizer: Tokenizer, folder: Path, padding: int = 0) -> GrammarCompiler:
    size = tokenizer.get_vocab_size() + padding
    return GrammarCompiler(saved(tokenizer, folder), size, [id_of(tokenizer, EOS)], num_threads=1)


def allowed(compiler: GrammarCompiler, matcher: GrammarMatcher, ends: Any = NO_ENDS) -> set[int]:
    bits = compiler.masks([matcher], [ends])
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


def spell(tokenizer: Tokenizer, compiler: GrammarCompiler, matcher: GrammarMatcher, text: str) -> None:
    """Say `text`, each time by the first token that is allowed and fits."""
    said: list[int] = []
    while (so_far := tokenizer.decode(said)) != text:
        longer = {token: tokenizer.decode([*said, token]) for token in sorted(allowed(compiler, matcher))}
        fitting = [token for token, after in longer.items() if text.startswith(after) and len(after) > len(so_far)]
        assert fitting, f"nothing goes on from {so_far!r}"
        said.append(fitting[0])
        matcher.accept(fitting[0])


@pytest.mark.parametrize("text", ["the fox 12", "a t"])
def test_text_is_spelled_with_the_vocabulary(tokenizer: Tokenizer, tmp_path: Path, text: str) -> None:
    compiler = make(tokenizer, tmp_path)
    matcher = compiler.matcher(Grammar(GrammarKind.REGEX, "[a-z0-9 ]+"))
    spell(tokenizer, compiler, matcher, text)
    assert matcher.is_accepting


def test_characters_without_a_token_are_spelled_in_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    compiler = make(tokenizer, tmp_path)
    matcher = compiler.matcher(Grammar(GrammarKind.CHOICE, '["\U0001f642"]'))
    said: list[int] = []
    while not matcher.is_complete:
        (token,) = allowed(compiler, matcher)
        said.append(token)
        matcher.accept(token)
    assert matcher.error is None
    assert len(said) == 4
    assert tokenizer.decode(said) == "\U0001f642"


def test_special_and_padding_tokens_are_in_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    compiler = make(tokenizer, tmp_path, padding=45)
    specials = {id_of(tokenizer, EOS), id_of(tokenizer, "<image>")}
    choices = allowed(compiler, compiler.matcher(Grammar(GrammarKind.REGEX, "(?s:.)+")))
    assert len(choices) > 200
    assert not choices & specials
    assert max(choices) < tokenizer.get_vocab_size()


def test_ends_are_allowed_where_the_text_is_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    compiler = make(tokenizer, tmp_path)
    end, other = id_of(tokenizer, EOS), id_of(tokenizer, "7")
    matcher = compiler.matcher(Grammar(GrammarKind.REGEX, "ab?"))
    ends = np.array([other, end])
    assert not allowed(compiler, matcher, ends) & {end, other}
    matcher.accept(id_of(tokenizer, "a"))
    letter = allowed(compiler, matcher)  # one token, or two where a byte has one too
    assert id_of(tokenizer, "b") in letter
    assert {tokenizer.decode([token]) for token in letter} == {"b"}
    assert allowed(compiler, matcher, ends) == letter | {end, other}


def test_masks_of_several_rows_are_those_of_each(tokenizer: Tokenizer, tmp_path: Path) -> None:
    compiler = make(tokenizer, tmp_path)
    matchers = [compiler.matcher(Grammar(GrammarKind.REGEX, letter + "+")) for letter in "abcdefgh"]
    together = compiler.masks(matchers, [NO_ENDS] * 8)
    alone = [compiler.masks([matcher], [NO_ENDS])[0] for matcher in matchers]
    assert (together == np.stack(alone)).all()
    assert len(np.unique(together, axis=0)) == 8


def test_a_model_with_fewer_rows_than_its_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    compiler = GrammarCompiler(saved(tokenizer, tmp_path), tokenizer.get_vocab_size() - 1, [10**9], num_threads=1)
    matcher = compiler.matcher(Grammar(GrammarKind.REGEX, "a"))
    assert id_of(tokenizer, "a") in allowed(compiler, matcher)


def test_matchers_of_one_grammar_do_not_share_where_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    compiler = make(tokenizer, tmp_path)
    ab = Grammar(GrammarKind.REGEX, "ab")
    first, second = compiler.matcher(ab), compiler.matcher(ab)
    first.accept(id_of(tokenizer, "a"))
    assert id_of(tokenizer, "b") in allowed(compiler, first)
    assert id_of(tokenizer, "a") not in allowed(compiler, first)
    assert id_of(tokenizer, "a") in allowed(compiler, second)


def test_compiled_grammars_are_kept_and_bounded(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = make(tokenizer, tmp_path)
    compiled: list[str] = []
    compile_one = compiler._compile

    def noted(grammar: Grammar) -> Any:
        compiled.append(grammar.text)
        return compile_one(grammar)

    monkeypatch.setattr(compiler, "_compile", noted)
    monkeypatch.setattr(grammar_module, "_MAX_COMPILED", 2)
    for text in ("a", "b", "a", "c", "a", "b"):
        compiler.compile(Grammar(GrammarKind.REGEX, text))
    assert compiled == ["a", "b", "c", "b"]
