"""The draft's context spells what the target committed, canonically, whatever is drafted and accepted."""

import random

import numpy as np
import pytest
from conftest import (
    EMBEDDED,
    EXACT,
    cases,
    examples,
    load_pair,
    load_tokenizer,
    load_vocabulary,
    shared_data,
    spellable,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vllm_tokentiming.align.retokenize import retokenize
from vllm_tokentiming.context import DraftContext, Drafted
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair

CODE = '''\
def merge(self, *others: "Counts", depth=0) -> dict[str, int]:
    """Adds up; keeps 'zero' entries."""
\tif not others or depth > 1_000:\t# tabs, too
        return {**self.items, "naïve": -1.5e-3}
    return sum((o.items[k]["x"] for o in others for k in o), start=0x41)\r\n\n\n
'''
EMOJI = (
    "🙂👩‍👩‍👧‍👦 ok 🏳️‍🌈🇫🇷!! \u200b\ufeff x\u00a0y 👍🏽… cafe\u0301 and café ▁▁ "
    "<s></s><|endoftext|> <tool_call> \x00\x7f 𝔘𝔫𝔦 "
)
MIXED = "The cat sat, and then: Привет, мир! 世界人权宣言。 हिन्दी العربية ไทย 한국어 12345 words\n\n"
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


def common_prefix(left: list[int], right: list[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


def canonical(pair: VocabularyPair, target_ids: list[int]) -> list[int]:
    """What an exact draft should read for some target tokens: all at once between special tokens."""
    ids: list[int] = []
    data = b""
    for target_id in target_ids:
        special = pair.target.token_bytes.special.get(target_id)
        if special is None:
            data += pair.target.token_bytes[target_id]
        elif target_id in pair.special.to_draft:
            counterpart = pair.special.to_draft[target_id]
            ids += pair.draft.encoder.encode(data)
            data = b""
            if not ids == pair.draft_prefix == [counterpart]:
                ids.append(counterpart)
        elif pair.special.unmapped == "text" and target_id not in pair.special.dropped:
            data += special.encode()
    ids += pair.draft.encoder.encode(data)
    prefix = pair.draft_prefix
    if not target_ids or ids[: len(prefix)] == prefix or (prefix == [pair.draft.separator] and pair.is_chat(ids)):
        return ids
    return prefix + ids


def standing_by_offsets(pair: VocabularyPair, drafted: Drafted, num_accepted: int) -> int:
    """Drafted tokens up to the last that ends where an accepted target token ends; none of them special."""
    accepted = drafted.proxy.target_ids[:num_accepted]
    target_ends = {len(pair.target.token_bytes.decode(accepted[:n])) for n in range(num_accepted + 1)}
    draft_ids = drafted.draft_ids
    draft_ends = [len(pair.draft.token_bytes.decode(draft_ids[:n])) for n in range(len(draft_ids) + 1)]
    return max(n for n, end in enumerate(draft_ends) if end in target_ends)


class Follower:
    """A draft's context beside everything that its target committed; each commit is checked."""

    def __init__(self, pair: VocabularyPair) -> None:
        self.pair, self.context, self.committed = pair, DraftContext(pair), []

    def commit(self, target_ids: list[int], drafted: Drafted | None = None) -> int:
        context, pair = self.context, self.pair
        read = list(context.draft_ids)
        kept = context.commit(target_ids, drafted)
        self.committed += target_ids
        assert context.num_target == len(self.committed)
        read += [] if drafted is None else drafted.draft_ids
        assert 0 <= kept <= len(context.draft_ids)
        assert context.draft_ids[:kept] == read[:kept]
        token_bytes, mapped = pair.draft.token_bytes, {*pair.draft_prefix, *pair.special.to_draft.values()}
        assert all(token_bytes.pieces[i] is not None or i in mapped for i in context.draft_ids)
        if pair.draft.encoder.exact:
            assert context.draft_ids == canonical(pair, self.committed)
        return kept


def draft_next(pair: VocabularyPair, data: bytes, rng: random.Random) -> Drafted | None:
    """What a draft might write before `data`: right, right up to some token, or nothing."""
    draft_ids = pair.draft.encoder.encode(data[:60])[: rng.randint(1, 8)]
    if rng.random() < 0.5:
        ordinary = np.flatnonzero(pair.draft.token_bytes.lengths)
        right = rng.randint(0, len(draft_ids))
        draft_ids = draft_ids[:right] + [int(rng.choice(ordinary)) for _ in range(rng.randint(0, 3))]
    return Drafted(draft_ids, retokenize(pair, draft_ids)) if draft_ids else None


def target_next(
    pair: VocabularyPair, data: bytes, drafted: Drafted | None, rng: random.Random
) -> tuple[list[int], int]:
    """What a target might commit: some of what was proposed, and one token of its own.

    Returns:
        The tokens, and how many of them are proposals.
    """
    proposed = [] if drafted is None else drafted.proxy.target_ids
    num_accepted = len(proposed) if rng.random() < 0.5 else rng.randint(0, len(proposed))
    accepted = pair.target.token_bytes.decode(proposed[:num_accepted])
    own = pair.target.encoder.encode(data[len(accepted) :][:60] if data.startswith(accepted) else data[:60])[:1]
    if not own or rng.random() < 0.1:
        own = [int(rng.choice(np.flatnonzero(pair.target.token_bytes.lengths)))]
    return proposed[:num_accepted] + own, num_accepted


def follow(pair: VocabularyPair, data: bytes, rng: random.Random) -> Follower:
    """Commit a text by a random schedule, and check every step."""
    follower = Follower(pair)
    while data:
        drafted = None if rng.random() < 0.1 else draft_next(pair, data, rng)
        target_ids, num_accepted = target_next(pair, data, drafted, rng)
        read = list(follower.context.draft_ids)
        kept = follower.commit(target_ids, drafted)
        if pair.exact:
            if drafted is not None:
                num_accepted = common_prefix(target_ids, drafted.proxy.target_ids)
                read += drafted.draft_ids[: standing_by_offsets(pair, drafted, num_accepted)]
            assert kept == common_prefix(read, follower.context.draft_ids)
        written = pair.target.token_bytes.decode(target_ids)
        data = data[len(written) :] if written and data.startswith(written) else data[rng.randint(1, 6) :]
    return follower


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


# Tokens that no text would give.


@pytest.mark.parametrize(
    "names",
    cases(
        [
            *(
                EMBEDDED,
                EMBEDDED[::-1],
                ("qwen2.5", "llama2"),
                ("llama2", "gpt2"),
                ("gpt_neox_20b", "mistral_tekken"),
            ),
            *(("llama3", "qwen2.5"), ("mistral_tekken", "gpt_neox_20b"), ("llama2", "mistral_tekken")),
            *(("t5_small", "llama2"), ("embedded_target", "bert"), ("bert", "t5_small")),
        ]
    ),
    ids="-".join,
)
@pytest.mark.parametrize("unmapped", ["text", "drop"])
@given(draw=st.data())
@examples(40)
def test_any_target_tokens_at_all_are_followed_special_ones_included(names, unmapped, draw):
    target, draft = map(load_vocabulary, names)
    pair = VocabularyPair.of(target, draft, unmapped=unmapped)
    special = st.sampled_from(sorted(target.token_bytes.special)[:6])
    target_ids = st.lists(st.integers(0, target.token_bytes.size - 1) | special, max_size=6)
    ordinary = st.sampled_from(np.flatnonzero(draft.token_bytes.lengths).tolist())
    ends = st.sampled_from([[], *([i] for i in pair.special.to_target)])
    follower = Follower(pair)
    for _ in range(draw.draw(st.integers(1, 4), label="steps")):
        draft_ids = draw.draw(st.lists(ordinary, max_size=5)) + draw.draw(ends)
        drafted = Drafted(draft_ids, retokenize(pair, draft_ids)) if draft_ids else None
        proposed = [] if drafted is None else drafted.proxy.target_ids
        accepted = draw.draw(st.integers(0, len(proposed)), label="accepted")
        follower.commit(proposed[:accepted] + draw.draw(target_ids), drafted)


def test_ids_of_the_heads_padding_add_nothing(embedded):
    target = Vocabulary.of(load_tokenizer("embedded_target"), head_size=9000)
    pair = VocabularyPair.of(target, embedded.pair.draft)
    follower = Follower(pair)
    follower.commit([8999, *target.encoder.encode(b"The"), 8999, *target.encoder.encode(b" end")])
    assert pair.draft.token_bytes.decode(follower.context.draft_ids) == b"The end"
    with pytest.raises(IndexError):
        follower.context.commit([9000])


# Special tokens.


def special_pair(embedded, **settings) -> tuple[VocabularyPair, dict[str, int], dict[str, int]]:
    pair = VocabularyPair.of(embedded.pair.target, embedded.pair.draft, **settings)
    return pair, dict(pair.target.special.by_text), dict(pair.draft.special.by_text)


def test_a_special_token_with_a_counterpart_crosses_and_nothing_merges_across_it(embedded):
    pair, target, draft = special_pair(embedded)
    follower = Follower(pair)
    encode = pair.target.encoder.encode
    follower.commit([*encode(b"The"), target["<|endoftext|>"], *encode(b"re")])
    the, there = pair.draft.encoder.encode(b"The"), pair.draft.encoder.encode(b"re")
    assert follower.context.draft_ids == [draft["<s>"], *the, draft["</s>"], *there]


def test_a_special_token_without_counterpart_is_written_as_text(embedded):
    pair, target, draft = special_pair(embedded)
    follower = Follower(pair)
    follower.commit([target["<|im_start|>"], *pair.target.encoder.encode(b"user\n")])
    assert follower.context.draft_ids == [draft["<s>"], *pair.draft.encoder.encode(b"<|im_start|>user\n")]


def test_a_special_token_without_counterpart_is_dropped_if_the_user_says_so(embedded):
    for settings_ in ({"unmapped": "drop"}, {"overrides": {"<|im_start|>": None}}):
        pair, target, draft = special_pair(embedded, **settings_)
        follower = Follower(pair)
        follower.commit([target["<|im_start|>"], *pair.target.encoder.encode(b"user\n")])
        assert follower.context.draft_ids == [draft["<s>"], *pair.draft.encoder.encode(b"user\n")]


def test_a_special_token_becomes_what_the_user_says(embedded):
    pair, target, draft = special_pair(embedded, overrides={"<|im_end|>": "</s>"})
    follower = Follower(pair)
    follower.commit([target["<|im_end|>"], target["<|im_end|>"]])
    assert follower.context.draft_ids == [draft["<s>"], draft["</s>"], draft["</s>"]]


@pytest.mark.parametrize("draft", ["embedded_draft", "llama2", "llama3", "mistral_tekken"])
def test_the_begin_of_text_token_is_not_doubled(draft):
    pair = load_pair("embedded_draft", draft)
    begin = pair.target.special.by_text["<s>"]
    hello = pair.target.encoder.encode(b"Hello")
    follower = Follower(pair)
    follower.commit([begin, *hello])
    expected = pair.draft_prefix + pair.draft.encoder.encode(b"Hello")
    assert len(pair.draft_prefix) == 1 and follower.context.draft_ids == expected
    follower.commit([begin])
    assert follower.context.draft_ids == expected + pair.draft_prefix


def test_an_end_that_was_drafted_and_accepted_is_kept(embedded):
    pair, target, draft = special_pair(embedded)
    follower = Follower(pair)
    follower.commit(pair.target.encoder.encode(b"The"))
    draft_ids = [*pair.draft.encoder.encode(b" end"), draft["</s>"]]
    drafted = Drafted(draft_ids, retokenize(pair, draft_ids))
    assert drafted.proxy.target_ids[-1] == target["<|endoftext|>"]
    read = len(follower.context.draft_ids)
    assert follower.commit(drafted.proxy.target_ids, drafted) == read + len(draft_ids)


def test_a_context_is_empty_until_something_is_committed(embedded):
    context = DraftContext(embedded.pair)
    assert context.commit([]) == 0
    assert (context.draft_ids, context.num_target) == ([], 0)


# What comes before a text.


def smollm2_like() -> Vocabulary:
    """The embedded target's vocabulary, with the start of a turn as `bos_token`, and ends of both kinds."""
    by_text = load_vocabulary("embedded_target").special.by_text
    return Vocabulary.of(load_tokenizer("embedded_target"), 0, by_text["<|im_start|>"], by_text["<|im_end|>"])


@pytest.mark.parametrize("own_turns", [True, False])
def test_a_separator_comes_before_a_text_and_not_before_a_chat(embedded, own_turns):
    pair = VocabularyPair.of(embedded.pair.target, smollm2_like(), own_turns=own_turns)
    special, encode = pair.draft.special.by_text, pair.target.encoder.encode
    text, chat = Follower(pair), Follower(pair)
    assert text.commit(encode(b"The")) == 0
    assert text.context.draft_ids == [special["<|endoftext|>"], *pair.draft.encoder.encode(b"The")]
    assert chat.commit([pair.target.special.by_text["<|im_start|>"], *encode(b"user\n")]) == 0
    assert chat.context.draft_ids == [special["<|im_start|>"], *pair.draft.encoder.encode(b"user\n")]
    for follower, number in ((text, 2), (chat, 1)):
        follower.commit(encode(b" and more"))
        assert sum(i in special.values() for i in follower.context.draft_ids) <= number


def test_two_contexts_of_a_pair_share_nothing(embedded):
    first, second = DraftContext(embedded.pair), DraftContext(embedded.pair)
    first.commit(embedded.pair.target.encoder.encode(b"The end"))
    assert not second.draft_ids


# What is no text.


@given(draw=st.data())
@examples(60)
def test_placeholders_are_left_out_wherever_they_are_and_however_the_prompt_is_cut(draw):
    pair = load_pair(*EMBEDDED)
    parts = draw.draw(st.lists(st.sampled_from(["The", " ship", "\n\n", " was", "?"]), min_size=1, max_size=6))
    target_ids, text, unread = [], b"", []
    for part in parts:
        if length := draw.draw(st.integers(0, 3), label="placeholder"):
            unread.append((len(target_ids), len(target_ids) + length))
            target_ids += [262_144] * length  # Outside of the vocabulary.
        target_ids += pair.target.encoder.encode(part.encode())
        text += part.encode()
    context = DraftContext(pair)
    while context.num_target < len(target_ids):
        count = draw.draw(st.integers(1, len(target_ids)), label="chunk")
        context.commit(target_ids[context.num_target :][:count], None, unread)
    assert context.num_target == len(target_ids)
    assert context.draft_ids == pair.draft_prefix + pair.draft.encoder.encode(text)


def test_an_image_leaves_no_trace_in_a_chat():
    special = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    tokenizers = [Tokenizer.from_str(load_tokenizer(name).to_str()) for name in EMBEDDED]
    for tokenizer in tokenizers:
        tokenizer.add_special_tokens(special)  # A draft that has these tokens has no use for them, either.
    pair = VocabularyPair.of(*map(Vocabulary.of, tokenizers))
    start, pad, end = (pair.target.special.by_text[text] for text in special)
    before, after = pair.target.encoder.encode(b"user\n"), pair.target.encoder.encode(b"What is this?")
    target_ids = [*before, start, *[pad] * 256, end, *after]
    context = DraftContext(pair)
    context.commit(target_ids, unread=[(len(before) + 1, len(before) + 257)])
    assert context.draft_ids == pair.draft_prefix + pair.draft.encoder.encode(b"user\nWhat is this?")
    assert not {start, end} & {*pair.special.to_draft, *pair.special.to_target.values()}
    wanted = VocabularyPair.of(pair.target, pair.draft, overrides={"<|vision_end|>": "<|vision_end|>"})
    assert wanted.special.to_draft[end] == pair.draft.special.by_text["<|vision_end|>"]


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
