"""Lists of byte strings as fast tokenizers: they encode as tiktoken and tekken do, and carry over as any other."""

import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.version")  # Which brings along the two that follow.

import mistral_common
import tiktoken
from conftest import EMBEDDED, MODELS, examples, load_vocabulary
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokentiming.cli import load_vocabulary as inspected
from vllm_tokentiming.config import SettingsError, TokenTimingConfig
from vllm_tokentiming.vllm.vocabulary_loader import load_pair
from vllm_tokentiming.vocab.pair import VocabularyPair
from vllm_tokentiming.vocab.tiktoken_format import fast_tokenizer
from vllm_tokentiming.vocab.token_bytes import TokenBytes

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
TEXTS = (
    "The cat's hats, 1234 of them!\n\n  def f(x):\treturn x",
    "Привет, мир! 世界人权宣言。हिन्दी العربية ไทย",
    "🙂👩\u200d👩\u200d👧 e\u0301\x00",
    " ",
    "",
)


def learnt(rounds: int) -> dict[bytes, int]:
    """Ranks of the commonest pairs in some text, over and over; many of them can be cut in several ways."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pieces = [bytes([byte]) for byte in ("the then there aaaa abab baba " * 3 + "".join(TEXTS)).encode()]
    for _ in range(rounds):
        pairs = list(pairwise(pieces))
        new = b"".join(max(sorted(set(pairs)), key=pairs.count))
        ranks.setdefault(new, len(ranks))
        merged, index = [], 0
        while index < len(pieces):
            together = b"".join(pieces[index : index + 2])
            merged.append(together if together == new else pieces[index])
            index += 2 if together == new else 1
        pieces = merged
    return ranks


RANKS = learnt(60)
ENCODING = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={"<|end|>": 400})
KEPT_AS = {"tokenizer": SimpleNamespace(tokenizer=ENCODING), "model": SimpleNamespace(model=ENCODING)}
CONVERTED = fast_tokenizer(KEPT_AS["model"])


@pytest.mark.parametrize("name", KEPT_AS)
def test_an_encoding_is_found_where_tokenizers_with_remote_code_keep_it(name):
    assert fast_tokenizer(KEPT_AS[name]).get_vocab_size() == len(RANKS) + 1


@examples(300)
@given(st.one_of(st.text(), st.text("theanrb ab", max_size=40), st.sampled_from(TEXTS)))
def test_a_list_encodes_as_tiktoken_does(text):
    text = text.encode("utf-8", "replace").decode()
    assert CONVERTED.encode(text).ids == ENCODING.encode_ordinary(text)


def test_special_tokens_of_a_list_keep_their_ids_and_have_no_bytes():
    token_bytes = TokenBytes.from_tokenizer(CONVERTED, 410)
    assert token_bytes.special == {400: "<|end|>"}
    assert {token_bytes[rank]: rank for rank in range(len(RANKS))} == RANKS
    assert token_bytes.pieces[len(RANKS) :] == [None] * (410 - len(RANKS))


def model(folder: Path, rows: int = 0) -> SimpleNamespace:
    """What `load_pair` asks of vLLM's `ModelConfig`."""
    mode = "mistral" if (folder / "tekken.json").exists() else "auto"
    return SimpleNamespace(
        tokenizer=str(folder), tokenizer_mode=mode, trust_remote_code=False, tokenizer_revision=None,
        get_vocab_size=lambda: rows,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tekken(tmp_path_factory) -> Path:
    """A folder with one of the vocabularies that Mistral publishes."""
    folder = tmp_path_factory.mktemp("tekken")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", folder / "tekken.json")
    return folder


def test_tekken_is_read_as_vllm_loads_it_and_encodes_alike(tekken):
    from vllm.tokenizers import get_tokenizer

    original = get_tokenizer(str(tekken), tokenizer_mode="mistral")
    read = load_pair(TokenTimingConfig(model="draft"), model(tekken, 131072), model(MODELS / "draft", 3072))
    encoder = read.target.encoder
    for text in TEXTS:
        assert encoder.encode(text.encode()) == original.tokenizer.encode(text, bos=False, eos=False)
    assert read.exact
    assert read.special.to_draft[original.bos_token_id] == 1
    assert read.special.to_target[2] == original.eos_token_id


def test_tekken_can_be_inspected(tekken):
    pair = VocabularyPair.of(inspected(str(tekken)), load_vocabulary(EMBEDDED[1]))
    assert pair.exact


def test_a_tokenizer_that_is_neither_is_refused_in_words(tmp_path):
    name = "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(Path(mistral_common.__file__).parent / "data" / name, tmp_path / "tokenizer.model.v3")
    sentencepiece = model(tmp_path, 32768)
    sentencepiece.tokenizer_mode = "mistral"
    with pytest.raises(SettingsError, match=r"neither a tokenizer\.json nor a list .* convert it to a fast tokenizer"):
        load_pair(TokenTimingConfig(model="draft"), sentencepiece, model(MODELS / "draft", 3072))
