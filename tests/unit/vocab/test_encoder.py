"""Any bytes are spelled in the middle of a text as the tokenizer would; a grown text costs only its end."""

import random
import unicodedata

import pytest
from conftest import (
    EMBEDDED,
    EXACT,
    LOSSY,
    cases,
    data_bytes,
    examples,
    load_tokenizer,
    load_vocabulary,
    own_ids,
    spellable,
    texts,
)
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vllm_tokentiming.vocab.encoder import Encoder, LossyEncoder, make_encoder
from vllm_tokentiming.vocab.token_bytes import TokenBytes, VocabularyKind, byte_alphabet

MAX_TAIL = 1024  # Bytes that may be encoded again for ever, at most.
ADDS_A_SPACE = ("llama2",)  # Its normaliser puts a `▁` before every text.

every_exact = pytest.mark.parametrize("name", cases(EXACT))
every_one = pytest.mark.parametrize("name", cases(EXACT + LOSSY))
few = examples(60)


def encoder_of(name: str) -> Encoder:
    return load_vocabulary(name).encoder


def made_from(tokenizer: Tokenizer) -> Encoder:
    return make_encoder(tokenizer, TokenBytes.from_tokenizer(tokenizer))


def assert_ordinary(encoder: Encoder, ids: list[int]) -> None:
    assert all(encoder.token_bytes.pieces[i] is not None for i in ids if i >= 0) and min(ids, default=0) >= 0


def in_parts(data: bytes, rng: random.Random, longest: int) -> list[bytes]:
    parts, start = [], 0
    while start < len(data):
        end = start + rng.randint(1, longest)
        parts.append(data[start:end])
        start = end
    return parts


class Growing:
    """A text that grows, of which only the unsettled end is encoded again."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.ids, self.settled, self.tail = encoder, [], 0, b""

    def grow(self, part: bytes) -> list[int]:
        self.tail += part
        encoded = self.encoder.encode_tail(self.tail)
        assert 0 <= encoded.settled_ids <= len(encoded.ids)
        assert 0 <= encoded.settled_bytes <= len(self.tail)
        self.ids[self.settled :] = encoded.ids
        self.settled += encoded.settled_ids
        self.tail = self.tail[encoded.settled_bytes :]
        return self.ids


# Exact vocabularies.


@every_exact
def test_vocabularies_that_can_spell_everything_are_found_to_be_exact(name):
    assert encoder_of(name).exact
    assert not isinstance(encoder_of(name), LossyEncoder)


@every_exact
@given(data=data_bytes)
@example(data=b"")
@example(data=bytes(range(256)))
@example(data="中".encode()[:2])
@example(data=b"\x96\x81 a\xe2\x96")
@few
def test_any_bytes_are_spelled_by_ordinary_tokens(name, data):
    encoder = encoder_of(name)
    ids = encoder.encode(data)
    assert_ordinary(encoder, ids)
    assert encoder.token_bytes.decode(ids) == spellable(encoder.token_bytes, data)


@every_exact
def test_only_one_vocabulary_lacks_bytes_and_those_are_in_no_character(name):
    missing = [byte for byte, token_id in enumerate(encoder_of(name).token_bytes.byte_ids()) if token_id < 0]
    assert missing == ([0xC0, 0xC1, *range(0xF5, 0x100)] if name == "gpt_neox_20b" else [])


@every_exact
@given(text=texts)
@example(text="")
@example(text=" ")
@example(text="plain <s> and <|endoftext|> and <|im_end|>")
@example(text="a" + " " * 40 + "b")
@few
def test_a_text_is_encoded_as_the_tokenizer_itself_would_in_the_middle_of_a_text(name, text):
    text = unicodedata.normalize("NFC", text)
    if encoder_of(name).token_bytes.kind is VocabularyKind.METASPACE:
        text = text.replace("▁", "")  # The tokenizer reads it as a space; see below.
    prefix = b" " if name in ADDS_A_SPACE and text else b""
    assert encoder_of(name).encode(prefix + text.encode()) == own_ids(name, text)


@every_exact
def test_texts_of_every_language_are_encoded_as_the_tokenizer_itself_would(name, languages):
    for language, text in languages.items():
        text = unicodedata.normalize("NFC", text[:3000])
        prefix = b" " if name in ADDS_A_SPACE else b""
        assert encoder_of(name).encode(prefix + text.encode()) == own_ids(name, text), language


def test_a_decomposed_accent_is_kept_as_it_is_although_the_tokenizer_would_compose_it():
    for name in ("gpt_neox_20b", "qwen2.5"):
        encoder = encoder_of(name)
        assert encoder.token_bytes.decode(own_ids(name, "cafe\u0301")) == "café".encode()
        assert encoder.token_bytes.decode(encoder.encode("cafe\u0301".encode())) == "cafe\u0301".encode()


def test_a_literal_mark_is_spelled_in_bytes_where_it_would_be_read_as_a_space():
    encoder = encoder_of("embedded_draft")
    ids = encoder.encode("a▁b".encode())
    assert [encoder.token_bytes[i] for i in ids] == [b"a", b"\xe2", b"\x96", b"\x81", b"b"]


def test_the_tokenizer_is_not_changed():
    tokenizer = Tokenizer.from_str(load_tokenizer("embedded_draft").to_str())
    before = tokenizer.to_str()
    made_from(tokenizer).encode(b"some text, twice")
    assert tokenizer.to_str() == before


# Growing texts.


@every_exact
@given(data=data_bytes, seed=st.integers(0, 9))
@example(data=("foo" + " " * 8 + "<|fim_prefix|>").encode(), seed=0)
@example(data=("foo" + " " * 8 + "<tool_call>").encode(), seed=0)
@example(data=("x" + " " * 30 + "\n  \n y " + " " * 25 + "z").encode(), seed=1)
@example(data="中文ABCd 中AB文Cd ÀÉa".encode(), seed=2)
@example(data="Wort 中文ABCé".encode(), seed=0)  # Two words become one.
@few
def test_a_text_that_grows_is_at_every_moment_encoded_as_if_at_once(name, data, seed):
    growing, seen = Growing(encoder_of(name)), b""
    for part in in_parts(data, random.Random(seed), longest=1 + seed):
        seen += part
        assert growing.grow(part) == growing.encoder.encode(seen)


@every_exact
def test_texts_of_every_language_cut_anywhere_are_encoded_as_if_at_once(name, languages):
    rng = random.Random(name)
    for language, text in languages.items():
        start = rng.randrange(len(text) // 2)
        data = text[start : start + 400].encode()
        growing, seen = Growing(encoder_of(name)), b""
        for part in in_parts(data, rng, longest=12):
            seen += part
            ids = growing.grow(part)
            assert growing.encoder.token_bytes.decode(ids) == seen, language
        assert ids == growing.encoder.encode(data), language
        assert growing.settled > len(ids) // 2, language


UNCUT = {
    "one letter": b"a" * 5000,
    "base64": bytes(random.Random(0).choices(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", k=5000)),
    "spaces": b" " * 5000,
    "line ends": b"\n" * 5000,
    "ideographs": "".join(random.Random(0).choices("世界人権宣言我的你是", k=2000)).encode(),
    "no characters": b"\xff" * 3000,
    "half characters": b"\xe4\xb8" * 2000,
    "letters and no characters": b"aaa\xffbbbb\xc0" * 500,
    "emoji": "🙂".encode() * 1000,
    "punctuation": b"=" * 5000,
    "marks": "▁".encode() * 1500,
    "digits": b"1234567890" * 400,
}


@every_one
@pytest.mark.parametrize("step", [90, 2500])
def test_a_long_text_without_any_cut_stays_exact_and_its_unsettled_end_stays_short(name, step):
    for label, data in UNCUT.items():
        growing = Growing(encoder_of(name))
        for start in range(0, len(data), step):
            ids = growing.grow(data[start : start + step])
            assert len(growing.tail) <= MAX_TAIL, label
        assert_ordinary(growing.encoder, ids)
        if growing.encoder.exact:
            assert growing.encoder.token_bytes.decode(ids) == spellable(growing.encoder.token_bytes, data), label


@every_exact
def test_bytes_that_a_vocabulary_lacks_do_not_shift_where_a_long_text_is_cut(name):
    growing = Growing(encoder_of(name))
    growing.grow(b"a" * 1100 + b"\xffbbb")
    ids = growing.grow(b" and more")
    spelled = spellable(growing.encoder.token_bytes, b"a" * 1100 + b"\xffbbb and more")
    assert growing.encoder.token_bytes.decode(ids) == spelled


@every_exact
def test_what_is_settled_are_the_first_ids_and_the_bytes_that_they_spell(name):
    encoder = encoder_of(name)
    data = "Some words, a few; and then सब मनुष्यों 世界 some more.".encode()
    encoded = encoder.encode_tail(data)
    assert 0 < encoded.settled_bytes < len(data)
    assert encoder.token_bytes.decode(encoded.ids[: encoded.settled_ids]) == data[: encoded.settled_bytes]
    assert encoder.encode_tail(b"") == type(encoded)([], 0, 0)


# Lossy vocabularies.


@pytest.mark.parametrize("name", cases(LOSSY))
def test_vocabularies_that_cannot_spell_everything_are_found_to_be_lossy(name):
    assert not encoder_of(name).exact


@pytest.mark.parametrize("name", cases(LOSSY))
@given(data=data_bytes, seed=st.integers(0, 9))
@example(data=b"", seed=0)
@example(data="日本語 🙂 [UNK] <unk> \u200b".encode(), seed=3)
@few
def test_lossy_encoders_write_what_they_can_with_ordinary_tokens_and_leave_out_the_rest(name, data, seed):
    growing = Growing(encoder_of(name))
    at_once = growing.encoder.encode(data)
    assert_ordinary(growing.encoder, at_once)
    ids = []
    for part in in_parts(data, random.Random(seed), longest=1 + seed):
        ids = growing.grow(part)
    assert ids == at_once


@pytest.mark.parametrize("name", cases(LOSSY))
def test_a_lossy_encoder_writes_what_its_tokenizer_writes_but_for_unk(name, languages):
    unknown = {i for i, text in load_vocabulary(name).token_bytes.special.items() if text in ("<unk>", "[UNK]")}
    assert unknown
    for language, text in languages.items():
        known = [i for i in own_ids(name, text[:2000]) if i not in unknown]
        assert encoder_of(name).encode(b" " + text[:2000].encode()) == known, language


@pytest.mark.parametrize(
    ("name", "text", "spelled"),
    [
        ("t5_small", " and so on,  and on", " and so on, and on"),
        ("t5_small", "ing", "ing"),
        ("bert", " The Café", " the cafe"),
    ],
)
def test_a_lossy_encoder_goes_on_in_the_middle_of_a_text(name, text, spelled):
    encoder = encoder_of(name)
    assert encoder.token_bytes.decode(encoder.encode(text.encode())) == spelled.encode()


# Tokenizers made here.

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


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_cache_of_pieces_is_emptied_before_it_grows_too_large(name, monkeypatch):
    monkeypatch.setattr("vllm_tokentiming.vocab.encoder._MAX_CACHED_PIECES", 5)
    encoder = make_encoder(load_tokenizer(name), load_vocabulary(name).token_bytes)
    data = " ".join(f"word{i} and another" for i in range(50)).encode()
    assert encoder.encode(data) == encoder_of(name).encode(data)
    assert len(encoder._cache) <= 5
