"""The draft's context spells what the target committed, canonically, whatever is drafted and accepted."""

import random

import pytest
from conftest import EMBEDDED, EXACT, cases, load_pair, shared_data, spellable
from context_follower import CODE, EMOJI, MIXED, Follower, follow

from vllm_tokentiming.align.retokenize import retokenize
from vllm_tokentiming.context import DraftContext, Drafted

TEXTS = {"code": CODE, "emoji": EMOJI, "mixed": MIXED}
MAX_TAIL = 1024

EXACT_PAIRS = [(target, draft) for target in EXACT for draft in EXACT if target != draft]
LOSSY_PAIRS = [
    *((target, "t5_small") for target in ("embedded_target", "llama2", "qwen2.5")),
    *((target, "bert") for target in ("embedded_target", "llama3", "t5_small", "bert")),
    *(("t5_small", draft) for draft in ("embedded_draft", "gpt2")),
    *(("bert", draft) for draft in ("embedded_target", "llama2")),
]
exact_pairs = pytest.mark.parametrize("names", cases(EXACT_PAIRS), ids="-".join)
lossy_pairs = pytest.mark.parametrize("names", cases(LOSSY_PAIRS), ids="-".join)


def parts_of(texts: dict[str, str], length: int, seed: str) -> dict[str, str]:
    """A part of every text, another one for every seed."""
    rng = random.Random(seed)
    chosen = {}
    for name, text in texts.items():
        start = rng.randrange(max(1, len(text) - length))
        chosen[name] = text[start : start + length]
    return chosen


@exact_pairs
def test_after_every_step_the_draft_has_read_what_the_target_has_committed(names):
    pair = load_pair(*names)
    for name, text in parts_of(TEXTS, 300, "-".join(names)).items():
        follower = follow(pair, text.encode(), random.Random(name))
        written = pair.draft.token_bytes.decode(follower.context.draft_ids)
        assert written == spellable(pair.draft.token_bytes, pair.target.token_bytes.decode(follower.committed)), name


@exact_pairs
def test_after_every_step_the_draft_has_read_what_the_target_has_committed_in_every_language(names, languages):
    pair = load_pair(*names)
    for name, text in parts_of(languages, 90, "-".join(names)).items():
        follower = follow(pair, text.encode(), random.Random(name))
        written = pair.draft.token_bytes.decode(follower.context.draft_ids)
        assert written == spellable(pair.draft.token_bytes, pair.target.token_bytes.decode(follower.committed)), name


@exact_pairs
def test_committed_without_drafts_a_text_is_what_the_draft_would_write_for_it(names):
    pair = load_pair(*names)
    follower, rng = Follower(pair), random.Random(0)
    text = (MIXED + CODE + EMOJI).encode()
    rest = pair.target.encoder.encode(text)
    while rest:
        count = rng.randint(1, 5)
        follower.commit(rest[:count])
        rest = rest[count:]
    assert follower.context.draft_ids == pair.draft_prefix + pair.draft.encoder.encode(text)


@exact_pairs
def test_whole_words_that_were_drafted_and_accepted_are_kept_all(names):
    pair = load_pair(*names)
    follower = Follower(pair)
    follower.commit(pair.target.encoder.encode(b" the cat"))
    for words in (b" sat on the mat", b" and was home", b" again"):
        draft_ids = pair.draft.encoder.encode(words)
        drafted = Drafted(draft_ids, retokenize(pair, draft_ids))
        read = len(follower.context.draft_ids)
        own = pair.target.encoder.encode(b" then")
        assert follower.commit([*drafted.proxy.target_ids, *own], drafted) == read + len(draft_ids)


def test_only_what_the_next_token_merges_with_is_read_again(embedded):
    pair = embedded.pair
    follower = Follower(pair)
    follower.commit(pair.target.encoder.encode(b"The ship"))
    draft_ids = pair.draft.encoder.encode(b" was in the night")
    assert len(draft_ids) == 4
    drafted = Drafted(draft_ids, retokenize(pair, draft_ids))
    read = len(follower.context.draft_ids)
    kept = follower.commit([*drafted.proxy.target_ids, *pair.target.encoder.encode(b"s")], drafted)
    assert read + 3 <= kept <= read + 4
    assert pair.draft.token_bytes.decode(follower.context.draft_ids) == b"The ship was in the nights"


def test_a_rejected_draft_leaves_the_context_as_if_it_had_never_been(embedded):
    pair = embedded.pair
    with_draft, without = Follower(pair), Follower(pair)
    begin, own = pair.target.encoder.encode(b"The ship was"), pair.target.encoder.encode(b" lost at sea")
    draft_ids = pair.draft.encoder.encode(b" found")
    for follower in (with_draft, without):
        follower.commit(begin)
    read = len(with_draft.context.draft_ids)
    assert with_draft.commit(own, Drafted(draft_ids, retokenize(pair, draft_ids))) == read
    without.commit(own)
    assert with_draft.context.draft_ids == without.context.draft_ids


def test_a_context_is_empty_until_something_is_committed(embedded):
    context = DraftContext(embedded.pair)
    assert context.commit([]) == 0
    assert (context.draft_ids, context.num_target) == ([], 0)


def test_two_contexts_of_a_pair_share_nothing(embedded):
    first, second = DraftContext(embedded.pair), DraftContext(embedded.pair)
    first.commit(embedded.pair.target.encoder.encode(b"The end"))
    assert not second.draft_ids


# Lossy vocabularies.


@lossy_pairs
def test_lossy_pairs_follow_as_well_as_they_can(names):
    pair = load_pair(*names)
    languages = {}
    if folder := shared_data():
        files = sorted((folder / "multilingual").glob("*.txt"))
        languages = {path.stem: path.read_text(encoding="utf-8")[:2000] for path in files}
    for name, text in parts_of({**TEXTS, **languages}, 200, "-".join(names)).items():
        follow(pair, text.encode(), random.Random(name))


def test_a_lossy_draft_keeps_what_it_wrote_as_it_wrote_it():
    pair = load_pair("embedded_target", "t5_small")
    follower = Follower(pair)
    follower.commit(pair.target.encoder.encode(b"The ship"))
    pieces = pair.draft.token_bytes.byte_ids()
    draft_ids = [*pair.draft.encoder.encode(b" was"), pieces[ord("h")], pieces[ord("e")], pieces[ord("r")]]
    drafted = Drafted(draft_ids, retokenize(pair, draft_ids))
    read = len(follower.context.draft_ids)
    assert follower.commit(drafted.proxy.target_ids, drafted) == read + len(draft_ids)
    assert follower.context.draft_ids[read:] == draft_ids


# The cost of a step.


@pytest.mark.parametrize(
    "names",
    cases([EMBEDDED, ("qwen2.5", "llama2"), ("llama2", "gpt_neox_20b"), ("gpt2", "t5_small")]),
    ids="-".join,
)
def test_the_work_of_a_step_does_not_grow_with_the_context(names, monkeypatch):
    pair = load_pair(*names)
    encoder, encode_tail, work = pair.draft.encoder, pair.draft.encoder.encode_tail, []
    monkeypatch.setattr(encoder, "encode_tail", lambda data: (work.append(len(data)), encode_tail(data))[1])
    context = DraftContext(pair)
    prose = (MIXED + CODE + EMOJI) * 40
    for data in (prose.encode(), b"a" * 6000, "世界".encode() * 1000, b"\xff" * 3000, b" " * 4000):
        target_ids = pair.target.encoder.encode(data)
        work.clear()
        for start in range(0, len(target_ids), 5):
            new = target_ids[start : start + 5]
            num_new = len(pair.target.token_bytes.decode(new))
            context.commit(new)
            assert sum(work) <= MAX_TAIL + num_new
            work.clear()


def test_the_work_of_a_step_is_a_few_words_in_ordinary_text(embedded, monkeypatch):
    pair = embedded.pair
    encoder, encode_tail, work = pair.draft.encoder, pair.draft.encoder.encode_tail, []
    monkeypatch.setattr(encoder, "encode_tail", lambda data: (work.append(len(data)), encode_tail(data))[1])
    context = DraftContext(pair)
    for target_id in pair.target.encoder.encode(MIXED.encode() * 50):
        context.commit([target_id])
    assert max(work) < 80
