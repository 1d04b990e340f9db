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
from encoders import Growing, assert_ordinary, in_parts, made_from
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vllm_tokentiming.vocab.encoder import Encoder, LossyEncoder, make_encoder
from vllm_tokentiming.vocab.token_bytes import VocabularyKind

MAX_TAIL = 1024  # Bytes that may be encoded again for ever, at most.
ADDS_A_SPACE = ("llama2",)  # Its normaliser puts a `▁` before every text.

every_exact = pytest.mark.parametrize("name", cases(EXACT))
every_one = pytest.mark.parametrize("name", cases(EXACT + LOSSY))
few = examples(60)


def encoder_of(name: str) -> Encoder:
    return load_vocabulary(name).encoder


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


# The cache of pieces.


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_cache_of_pieces_is_emptied_before_it_grows_too_large(name, monkeypatch):
    monkeypatch.setattr("vllm_tokentiming.vocab.encoder._MAX_CACHED_PIECES", 5)
    encoder = make_encoder(load_tokenizer(name), load_vocabulary(name).token_bytes)
    data = " ".join(f"word{i} and another" for i in range(50)).encode()
    assert encoder.encode(data) == encoder_of(name).encode(data)
    assert len(encoder._cache) <= 5
