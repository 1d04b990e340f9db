"""Every id of a vocabulary has the bytes that its tokenizer would decode it to, or none."""

import unicodedata

import numpy as np
import pytest
from conftest import EMBEDDED, EXACT, LOSSY, cases, load_tokenizer, load_vocabulary, own_ids
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vllm_tokentiming.vocab.token_bytes import TokenBytes, VocabularyKind, byte_alphabet, kind_of

TEXT = "Plain text, with  spaces,\n\ttabs, naïve café, Привет, 世界, 🙂👩‍👩‍👧 and 12345 digits. "
ADDS_A_SPACE = ("llama2",)  # Its normaliser puts a `▁` before every text.


def byte_level(*merged: str, **parts) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*byte_alphabet(), *merged])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], **parts))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(*tokens: str) -> Tokenizer:
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *tokens]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


@pytest.mark.parametrize("name", cases(EXACT))
def test_the_tokenizers_own_ids_of_a_text_spell_its_bytes(name):
    spelled = load_vocabulary(name).token_bytes.decode(own_ids(name, TEXT))
    assert spelled == (b" " if name in ADDS_A_SPACE else b"") + TEXT.encode()


@pytest.mark.parametrize("name", cases(EXACT))
def test_the_tokenizers_own_ids_spell_texts_of_every_language(name, languages):
    for language, text in languages.items():
        text = unicodedata.normalize("NFC", text[:1500])  # Two of the tokenizers normalise.
        spelled = load_vocabulary(name).token_bytes.decode(own_ids(name, text))
        assert spelled == (b" " if name in ADDS_A_SPACE else b"") + text.encode(), language


@pytest.mark.parametrize(
    ("name", "text", "spelled"),
    [
        ("t5_small", "Plain text, twice.  Two", b" Plain text, twice. Two"),
        ("bert", "Plain text unbelievably twice", b" plain text unbelievably twice"),
    ],
)
def test_a_lossy_tokenizers_ids_spell_what_it_makes_of_a_text(name, text, spelled):
    assert load_vocabulary(name).token_bytes.decode(own_ids(name, text)) == spelled


@pytest.mark.parametrize("name", cases(EXACT + LOSSY))
def test_special_tokens_and_head_padding_have_no_bytes_and_everything_else_has(name):
    tokenizer = load_tokenizer(name)
    size = tokenizer.get_vocab_size()
    token_bytes = TokenBytes.from_tokenizer(tokenizer, head_size=size + 100)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert special and special == set(token_bytes.special)
    assert token_bytes.size == len(token_bytes.pieces) == len(token_bytes.lengths) == size + 100
    without = {i for i, piece in enumerate(token_bytes.pieces) if piece is None}
    assert without == special | set(range(size, size + 100))
    assert [len(piece or b"") for piece in token_bytes.pieces] == token_bytes.lengths.tolist()
    assert token_bytes.decode([*special, size + 99]) == b""


def test_every_kind_of_vocabulary_is_recognised_by_its_components():
    kinds = {name: load_vocabulary(name).token_bytes.kind for name in EMBEDDED}
    assert kinds == {
        "embedded_target": VocabularyKind.BYTE_LEVEL,
        "embedded_draft": VocabularyKind.METASPACE,
    }
    assert kind_of(byte_level()) is VocabularyKind.BYTE_LEVEL
    assert kind_of(metaspace()) is VocabularyKind.METASPACE
    assert kind_of(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))) is VocabularyKind.WORDPIECE
    assert kind_of(Tokenizer(models.BPE({"a": 0}, []))) is VocabularyKind.PLAIN


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt2", VocabularyKind.BYTE_LEVEL),
        ("llama2", VocabularyKind.METASPACE),
        ("llama3", VocabularyKind.BYTE_LEVEL),
        ("t5_small", VocabularyKind.METASPACE),
        ("bert", VocabularyKind.WORDPIECE),
    ],
)
def test_real_vocabularies_are_of_their_kind(name, kind):
    assert load_vocabulary(name).token_bytes.kind is kind


def test_the_byte_alphabet_is_that_of_the_tokenizers_library():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    for character in map(chr, range(128)):
        assert alphabet[ord(character)] == byte_level().encode(character).tokens[0]


def test_byte_level_tokens_spell_bytes_that_need_not_be_characters():
    token_bytes = TokenBytes.from_tokenizer(byte_level("Ġhello", "ä¸", "ĊĊ"))
    assert token_bytes.pieces[256:] == [b" hello", b"\xe4\xb8", b"\n\n"]
    assert token_bytes.pieces[:256] == [bytes([byte]) for byte in range(256)]


def test_a_byte_level_token_outside_the_alphabet_is_its_text():
    assert TokenBytes.from_tokenizer(byte_level("世界")).pieces[256] == "世界".encode()


def test_metaspace_tokens_spell_spaces_and_byte_tokens_spell_bytes():
    token_bytes = TokenBytes.from_tokenizer(metaspace("▁a", "A", "▁▁", "<0x4>", "<0xZZ>"))
    assert token_bytes.pieces[257:] == [b" ", b" a", b"A", b"  ", b"<0x4>", b"<0xZZ>"]
    assert token_bytes.pieces[1:257] == [bytes([byte]) for byte in range(256)]
    assert token_bytes.special == {0: "<unk>"}


def test_a_byte_and_its_letter_are_two_ids_with_the_same_bytes_and_the_letter_is_preferred():
    token_bytes = TokenBytes.from_tokenizer(metaspace("A"))
    byte_token, letter = 1 + 0x41, 258
    assert token_bytes[byte_token] == token_bytes[letter] == b"A"
    assert token_bytes.byte_ids()[0x41] == letter
    assert token_bytes.byte_ids()[0x42] == 1 + 0x42


def test_llama2_has_the_byte_fallback_duplicates_that_are_known_of_it():
    token_bytes, tokenizer = load_vocabulary("llama2").token_bytes, load_tokenizer("llama2")
    byte_token, letter = tokenizer.token_to_id("<0x41>"), tokenizer.token_to_id("A")
    assert byte_token != letter and token_bytes[byte_token] == token_bytes[letter] == b"A"
    assert token_bytes.byte_ids()[0x41] == letter
    pieces = [piece for piece in token_bytes.pieces if piece is not None]
    assert (len(pieces), len(set(pieces))) == (31997, 31901)


def test_wordpiece_tokens_begin_a_word_unless_they_continue_one():
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "#": 3, "##": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix="##"))
    token_bytes = TokenBytes.from_tokenizer(tokenizer)
    assert token_bytes.pieces == [None, b" play", b"ing", b" #", b""]
    assert token_bytes.lengths.tolist() == [0, 5, 3, 2, 0]


def test_unigram_tokens_spell_as_metaspace_does():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("s", -2.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    token_bytes = TokenBytes.from_tokenizer(tokenizer)
    assert token_bytes.pieces == [None, b" the", b"s"]
    assert token_bytes.special == {0: "<unk>"}


def test_plain_tokens_are_their_text():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "Wort": 1, "é": 2}, unk_token="[UNK]"))
    assert TokenBytes.from_tokenizer(tokenizer).pieces == [None, b"Wort", b"\xc3\xa9"]


def test_an_added_token_that_is_not_special_is_ordinary_text_whatever_the_spelling():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool> ü", special=False)])
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    token_bytes = TokenBytes.from_tokenizer(tokenizer)
    assert token_bytes.pieces[256:] == ["<tool> ü".encode(), None]
    assert token_bytes.special == {257: "<end>"}


def test_ids_that_the_vocabulary_skips_have_no_bytes():
    token_bytes = TokenBytes({0: b"a", 3: b"bc"}, {5: "<s>"}, VocabularyKind.PLAIN, 0)
    assert token_bytes.size == 6
    assert token_bytes.pieces == [b"a", None, None, b"bc", None, None]
    assert token_bytes.decode([0, 1, 2, 3, 4, 5]) == b"abc"


def test_a_special_token_wins_over_a_piece_of_the_same_id():
    assert TokenBytes({0: b"a"}, {0: "<s>"}, VocabularyKind.PLAIN, 0).pieces == [None]


@pytest.mark.parametrize(("head_size", "size"), [(0, 2), (1, 2), (2, 2), (7, 7)])
def test_the_head_may_have_more_rows_than_the_tokenizer_has_entries_but_never_hides_one(head_size, size):
    token_bytes = TokenBytes({0: b"a", 1: b"b"}, {}, VocabularyKind.PLAIN, head_size)
    assert token_bytes.size == size
    assert token_bytes.decode(range(size)) == b"ab"


def test_an_empty_vocabulary_has_no_ids():
    token_bytes = TokenBytes({}, {}, VocabularyKind.PLAIN, 0)
    assert (token_bytes.size, token_bytes.pieces, token_bytes.byte_ids()) == (0, [], [-1] * 256)
    assert token_bytes.lengths.dtype == np.int32


@pytest.mark.parametrize("token_id", [-1, 3, 10**9])
def test_an_id_outside_the_vocabulary_is_an_index_error_and_not_another_token(token_id):
    token_bytes = TokenBytes({0: b"a", 1: b"b"}, {}, VocabularyKind.PLAIN, 3)
    with pytest.raises(IndexError, match=f"token id {token_id} is outside a vocabulary of 3 entries"):
        token_bytes[token_id]
    with pytest.raises(IndexError):
        token_bytes.decode([0, token_id])
