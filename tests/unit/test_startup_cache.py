"""What is kept between starts is what would be made anew, whatever happens to the files."""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from conftest import EMBEDDED, MODELS, cases, load_tokenizer
from tokenizers import Tokenizer

from vllm_tokentiming import startup_cache
from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.startup_cache import StartupCache, tokenizer_digest
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair

TEXTS = ["Hello,  World!\n\tif x: pass", "naïve Straße 日本語 🙂 हिन्दी", "▁ <0x41> <|im_start|>", "\x00\x7f"]
PAIRS = [EMBEDDED, ("llama2", "gpt2"), ("bert", "t5_small"), ("qwen2.5", "llama2")]


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def cache(tmp_path, warnings):
    return StartupCache(tmp_path / "cache", warnings.append)


def the_same_pair(cache, names) -> tuple[VocabularyPair, VocabularyPair]:
    """A pair as it is read, and as it is kept."""
    sides = []
    for name in names:
        read = Vocabulary.of(load_tokenizer(name), 0, 1, 2, None, name)
        cache.keep_vocabulary(name, load_tokenizer(name), read, 1, 2)
        sides.append((read, cache.vocabulary(name, 0)))
    (target, kept_target), (draft, kept_draft) = sides
    return VocabularyPair.of(target, draft), VocabularyPair.of(kept_target, kept_draft)


@pytest.mark.parametrize("names", cases(PAIRS), ids=" from ".join)
def test_kept_vocabularies_are_those_that_were_read(cache, warnings, names):
    read, kept = the_same_pair(cache, names)
    for was, now in ((read.target, kept.target), (read.draft, kept.draft)):
        assert now.token_bytes.pieces == was.token_bytes.pieces
        assert now.token_bytes.special == was.token_bytes.special
        assert now.token_bytes.kind is was.token_bytes.kind
        assert (now.special, now.turns, now.added, now.exact) == (was.special, was.turns, was.added, was.exact)
        for text in TEXTS:
            data = text.encode()
            for end in range(len(data) + 1):
                assert now.encoder.encode(data[:end]) == was.encoder.encode(data[:end])
    assert not warnings


@pytest.mark.parametrize("one_to_one", [False, True])
@pytest.mark.parametrize("names", cases(PAIRS), ids=" from ".join)
def test_a_kept_transducer_writes_what_a_new_one_writes(cache, warnings, names, one_to_one):
    pair, _ = the_same_pair(cache, names)
    new = Transducer(pair, one_to_one=one_to_one)
    cache.transducer(pair, one_to_one=one_to_one)
    kept = cache.transducer(pair, one_to_one=one_to_one)
    for name in ("draftable", "first", "count", "waiting", "lost"):
        was, now = getattr(new, name), getattr(kept, name)
        assert now.dtype == was.dtype and np.array_equal(now, was)
    assert kept.left_waiting == new.left_waiting
    pieces = {b"", *new.left_waiting}
    for pending in pieces:
        was, now = new.waits(pending), kept.waits(pending)
        assert now.pending == was.pending
        assert np.array_equal(now.target_ids, was.target_ids) and np.array_equal(now.groups, was.groups)
    for draft_id in np.flatnonzero(new.draftable).tolist():
        assert kept.emit(b"", draft_id) == new.emit(b"", draft_id)
    assert not warnings


def test_a_kept_transducer_is_not_worked_out_again(cache, monkeypatch):
    read, kept = the_same_pair(cache, EMBEDDED)
    cache.transducer(read)
    monkeypatch.setattr(Transducer, "_write", None)
    assert len(cache.transducer(kept).count)
    assert "encoder" not in vars(kept.target) | vars(kept.draft), "they are made when they are needed"


def test_what_crosses_otherwise_is_kept_apart(cache):
    pair, _ = the_same_pair(cache, EMBEDDED)
    to_target = {draft_id: 1 for draft_id in pair.special.to_target}
    other = replace(pair, special=replace(pair.special, to_target=to_target))
    assert Transducer(other).first.tolist() != Transducer(pair).first.tolist()
    for _ in ("made", "kept"):
        for either in (pair, other):
            assert cache.transducer(either).first.tolist() == Transducer(either).first.tolist()
        assert cache.transducer(pair, one_to_one=True).draftable.sum() < cache.transducer(pair).draftable.sum()


def test_the_rows_of_the_head_are_not_part_of_what_is_kept(cache):
    pair, _ = the_same_pair(cache, EMBEDDED)
    size = pair.draft.token_bytes.size
    larger = cache.vocabulary(EMBEDDED[1], size + 7)
    assert larger.token_bytes.size == size + 7 and larger.token_bytes.pieces[-7:] == [None] * 7
    padded = VocabularyPair.of(pair.target, larger)
    assert len(cache.transducer(pair).count) == size
    assert len(cache.transducer(padded).count) == size + 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(file.read_bytes()[:500] + b"?" * 50 + file.read_bytes()[550:]),
        lambda file: np.savez(file, facts=np.frombuffer(b"{}", np.uint8)),
        lambda file: np.savez(file, facts=np.array([{}], dtype=object)),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_damaged_entries_are_made_anew(cache, tmp_path, warnings, damage):
    pair, _ = the_same_pair(cache, EMBEDDED)
    new = cache.transducer(pair)
    for file in (tmp_path / "cache").iterdir():
        damage(file)
    assert cache.vocabulary(EMBEDDED[0], 0) is None
    assert cache.transducer(pair).count.tolist() == new.count.tolist()
    assert len(warnings) >= 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays: arrays["emitted"].fill(1 << 40),
        lambda arrays: arrays["emitted"].fill(-1),
        lambda arrays: arrays["count"].fill(-1),
        lambda arrays: arrays["count"].fill(2),
        lambda arrays: arrays.update(draftable=arrays["draftable"][:-1]),
    ],
)
def test_tables_of_another_pair_are_not_taken(cache, warnings, spoil):
    pair, _ = the_same_pair(cache, EMBEDDED)
    new = Transducer(pair)
    arrays = {name: array.copy() for name, array in new.to_arrays().items()}
    spoil(arrays)
    with pytest.raises(ValueError, match="do not fit the pair"):
        Transducer(pair, stored=arrays)


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, warnings):
    (tmp_path / "cache").write_text("no folder")
    pair, _ = the_same_pair(StartupCache(tmp_path / "elsewhere"), EMBEDDED)
    assert len(StartupCache(tmp_path / "cache", warnings.append).transducer(pair).count)
    assert any("the next start takes as long as this one" in warning for warning in warnings)


def test_engines_that_start_at_once_disturb_nobody(cache, tmp_path, warnings):
    pair, _ = the_same_pair(cache, EMBEDDED)
    arrays, stop, read = Transducer(pair).to_arrays(), threading.Event(), []

    def write():
        while not stop.is_set():
            cache.keep("entry", arrays)

    writers = [threading.Thread(target=write) for _ in range(4)]
    cache.keep("entry", arrays)
    for writer in writers:
        writer.start()
    for _ in range(50):
        read.append(cache.load("entry"))
    stop.set()
    for writer in writers:
        writer.join()
    assert all(np.array_equal(found["emitted"], arrays["emitted"]) for found in read)
    assert not warnings
    assert not list((tmp_path / "cache").glob("writing-*"))


# Names.


@pytest.fixture
def folder(tmp_path):
    copied = tmp_path / "model"
    shutil.copytree(MODELS / "draft", copied)
    return copied


def rename_a_token(folder):
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["added_tokens"][0]["content"] += "!"
    file.write_text(json.dumps(described))


@pytest.mark.parametrize(
    "change",
    [
        rename_a_token,
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        lambda folder: (folder / "added_tokens.json").write_text("{}"),
    ],
)
def test_any_change_of_a_file_gives_another_name(folder, change):
    before = tokenizer_digest(str(folder), None, "loader")
    change(folder)
    assert before != tokenizer_digest(str(folder), None, "loader")


def test_the_loader_and_our_own_code_are_part_of_the_name(folder, monkeypatch):
    before = tokenizer_digest(str(folder), None, "loader 1")
    assert before == tokenizer_digest(str(folder), None, "loader 1")
    assert before != tokenizer_digest(str(folder), None, "loader 2")
    monkeypatch.setattr(startup_cache, "_code_digest", lambda: "other code")
    assert before != tokenizer_digest(str(folder), None, "loader 1")


def test_weights_are_not_read_for_the_name(folder):
    before = tokenizer_digest(str(folder), None, "loader")
    (folder / "more.safetensors").write_bytes(b"weights")
    assert before == tokenizer_digest(str(folder), None, "loader")


def test_a_repository_of_the_hub_is_named_by_what_was_downloaded(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(startup_cache, "try_to_load_from_cache", lambda *_, **__: None)
    assert tokenizer_digest("someone/model", None, "loader") is None
    found = {"tokenizer_config.json": str(folder / "tokenizer_config.json")}
    monkeypatch.setattr(startup_cache, "try_to_load_from_cache", lambda name, file, revision: found.get(file))
    assert tokenizer_digest("someone/model", None, "loader") == tokenizer_digest(str(folder), None, "loader")


def test_tokenizers_with_parts_in_python_are_not_kept(cache, tmp_path):
    class Unspeakable:
        def to_str(self):
            raise Exception("Custom Normalizer cannot be serialized")

    read = Vocabulary.of(Tokenizer.from_file(str(MODELS / "draft" / "tokenizer.json")))
    cache.keep_vocabulary("name", Unspeakable(), read, None, None)
    assert cache.vocabulary("name", 0) is None
