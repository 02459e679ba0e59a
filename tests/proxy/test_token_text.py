"""Tokens that stand alone: their bytes, joined, are the text that they were made of."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from proxy.text.token_text import TokenTexts
from proxy.text.tokenizer import Tokenizer

TEXTS = ["hello world", "a 👩‍👩‍👧 日本 b\n\t", "naïve <|im_end|> <think>x", "\x00\x7f\u00a0"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_byte_level_tokens_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    texts = TokenTexts(tokenizer.backend)
    token_ids = tokenizer.encode(text)
    assert b"".join(texts.raw(token) for token in token_ids) == text.encode()


def test_part_of_a_character(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer.backend)
    first = tokenizer.encode("👩")[0]
    assert texts.raw(first) == "👩".encode()[: len(texts.raw(first))]
    assert texts.text(first) == "\ufffd"


def test_an_id_without_a_token(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer.backend)
    assert (texts.raw(10**6), texts.text(10**6)) == (b"", "")


def sentencepiece() -> Backend:
    """As Llama 2 has it: blanks are written ▁, and what is not in the vocabulary as bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "b"]
    backend = Backend(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return backend


@pytest.mark.parametrize("text", ["ab a", "a日b", " a", "a<s>b"])
def test_bytes_of_sentencepiece_tokens_make_up_the_text(text: str) -> None:
    backend = sentencepiece()
    texts = TokenTexts(backend)
    token_ids = backend.encode(text, add_special_tokens=False).ids
    assert b"".join(texts.raw(token) for token in token_ids) == text.encode()


def test_other_decoders() -> None:
    words = Backend(models.WordPiece({"un": 0, "##able": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece("##")
    assert [TokenTexts(words).text(token) for token in (0, 1)] == [" un", "able"]
    metaspace = Backend(models.BPE({"▁x": 0}, []))
    metaspace.decoder = decoders.Metaspace()
    assert TokenTexts(metaspace).text(0) == " x"
    bare = Backend(models.BPE({"x": 0}, []))
    assert TokenTexts(bare).text(0) == "x"
