"""Small tokenizers of every kind, made here: their encoders spell any bytes, or as many as the vocabulary can."""

import random

import pytest
from conftest import data_bytes, examples
from encoders import Growing, assert_ordinary, in_parts, made_from
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vllm_tokentiming.vocab.token_bytes import byte_alphabet

LETTERS = {letter: i for i, letter in enumerate(byte_alphabet())}
BYTE_TOKENS = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)} | {"▁": 257}


def byte_level_bpe() -> Tokenizer:
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("ä", "¸")]
    vocabulary = LETTERS | {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def byte_level_normalizer() -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level_normalizer_and_split() -> Tokenizer:
    tokenizer = byte_level_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("Ġ?[^Ġ]+|Ġ+"), "isolated")
    return tokenizer


def sentencepiece_bpe(ignore_merges: bool = False) -> Tokenizer:
    names = ["a", "b", "▁a", "ab", "▁▁", "é"]
    vocabulary = BYTE_TOKENS | {name: 258 + i for i, name in enumerate(names)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    model = models.BPE(
        vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True, ignore_merges=ignore_merges
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def metaspace_bpe() -> Tokenizer:
    tokenizer = sentencepiece_bpe()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    return tokenizer


def unigram_with_bytes() -> Tokenizer:
    scores = [(token, -20.0) for token in BYTE_TOKENS]
    tokenizer = Tokenizer(models.Unigram([*scores, ("▁th", -2.0), ("e", -3.0), ("▁the", -2.5)], 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def with_added_text() -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    "), AddedToken("  ")])
    tokenizer.add_special_tokens([AddedToken("<end>")])
    return tokenizer


MADE_EXACT = {
    "byte-level BPE": byte_level_bpe,
    "byte-level normaliser": byte_level_normalizer,
    "byte-level normaliser and split": byte_level_normalizer_and_split,
    "SentencePiece BPE": sentencepiece_bpe,
    "SentencePiece BPE that ignores merges": lambda: sentencepiece_bpe(ignore_merges=True),
    "Metaspace BPE": metaspace_bpe,
    "Unigram with byte tokens": unigram_with_bytes,
    "added text": with_added_text,
}


@pytest.mark.parametrize("make", MADE_EXACT.values(), ids=MADE_EXACT)
def test_every_kind_of_vocabulary_with_all_bytes_is_exact(make):
    encoder = made_from(make())
    assert encoder.exact

    @given(data=data_bytes)
    @example(data=b"<0x41>")
    @example(data=b"the <tool> the    the")
    @examples(40)
    def any_bytes_are_spelled(data):
        ids = encoder.encode(data)
        assert_ordinary(encoder, ids)
        assert encoder.token_bytes.decode(ids) == data
        growing = Growing(encoder)
        for part in in_parts(data, random.Random(0), longest=4):
            growing.grow(part)
        assert growing.ids == ids

    any_bytes_are_spelled()


def test_pieces_are_merged_as_the_tokenizer_merges_them():
    encoder = made_from(byte_level_bpe())
    assert encoder.encode(b" the the") == [258, 258]
    assert encoder.encode("中".encode()) == [259, 0xAD]
    assert encoder.encode("中".encode()[:2]) == [259]
    encoder = made_from(sentencepiece_bpe())
    assert [encoder.token_bytes[i] for i in encoder.encode(b"ab ab  x")] == [b"ab", b" a", b"b", b"  ", b"x"]


def test_added_text_is_one_token_but_special_text_is_not():
    encoder = made_from(with_added_text())
    pieces = [encoder.token_bytes[i] for i in encoder.encode(b"x<tool>     <end>")]
    assert pieces == [b"x", b"<tool>", b"    ", b" ", b"<", b"e", b"n", b"d", b">"]


def no_bytes_bpe() -> Tokenizer:
    return Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, [("a", "b")], unk_token="<unk>"))


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("?", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def few_letters() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "Ġa": 3}, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "b": 3}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


MADE_LOSSY = {
    "BPE without bytes": no_bytes_bpe,
    "words": words,
    "Unigram": unigram,
    "byte-level BPE with few letters": few_letters,
    "WordPiece": wordpiece,
}


@pytest.mark.parametrize("make", MADE_LOSSY.values(), ids=MADE_LOSSY)
def test_a_vocabulary_without_all_bytes_is_lossy_and_never_writes_unk(make):
    encoder = made_from(make())
    assert not encoder.exact

    @given(data=data_bytes | st.text("ab xé?", max_size=9).map(str.encode))
    @examples(40)
    def only_ordinary_tokens_are_written(data):
        assert_ordinary(encoder, encoder.encode(data))

    only_ordinary_tokens_are_written()
    written = [encoder.token_bytes[i].strip() for i in encoder.encode(" a éx b".encode())]
    assert [piece for piece in written if piece] == [b"a", b"b"]


def test_a_lossy_vocabulary_that_has_spaces_keeps_them():
    encoder = made_from(few_letters())
    assert encoder.token_bytes.decode(encoder.encode(b" a b  xa")) == b" a b  a"
