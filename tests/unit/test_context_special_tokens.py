"""The draft's context reads special tokens as their counterparts or as text, and leaves out what is no text."""

import numpy as np
import pytest
from conftest import EMBEDDED, cases, examples, load_pair, load_tokenizer, load_vocabulary
from context_follower import Follower
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vllm_tokentiming.align.retokenize import retokenize
from vllm_tokentiming.context import DraftContext, Drafted
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair

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
