"""Drafted tokens become ordinary target tokens of the same text, and each has its place in a block."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
from conftest import EMBEDDED, cases, examples, load_pair
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokentiming.align.retokenize import Proxy, align, aligned_draft_tokens, retokenize
from vllm_tokentiming.vocab.pair import VocabularyPair
from vllm_tokentiming.vocab.special_tokens import Role

EXACT_PAIRS = [
    EMBEDDED,
    EMBEDDED[::-1],
    ("embedded_target", "embedded_target"),
    ("qwen2.5", "llama2"),
    ("llama2", "gpt2"),
    ("llama3", "mistral_tekken"),
    ("mistral_tekken", "llama3"),
    ("gpt2", "gpt_neox_20b"),
    ("gpt_neox_20b", "qwen2.5"),
]
LOSSY_PAIRS = [
    ("embedded_target", "t5_small"),
    ("t5_small", "llama2"),
    ("bert", "embedded_draft"),
    ("llama3", "bert"),
    ("bert", "t5_small"),
]
every_exact_pair = pytest.mark.parametrize("names", cases(EXACT_PAIRS), ids="-".join)
every_pair = pytest.mark.parametrize("names", cases(EXACT_PAIRS + LOSSY_PAIRS), ids="-".join)
few = examples(60)


def drafted_by(draw: st.DataObject, pair: VocabularyPair) -> list[int]:
    """Any tokens that a draft may write, at most the last of which is special."""
    ordinary = np.flatnonzero(pair.draft.token_bytes.lengths)
    indices = draw.draw(st.lists(st.integers(0, len(ordinary) - 1), max_size=8), label="drafted")
    ends = sorted(pair.special.to_target)
    last = draw.draw(st.sampled_from([None, None, *ends]), label="end")
    return ordinary[indices].tolist() + ([] if last is None else [last])


def ends(lengths) -> list[int]:
    return [0, *accumulate(lengths)]


@every_pair
@given(draw=st.data())
@few
def test_proposals_are_ordinary_tokens_but_for_an_end_that_the_draft_meant(names, draw):
    pair = load_pair(*names)
    drafted = drafted_by(draw, pair)
    proxy = retokenize(pair, drafted)
    ordinary = proxy.target_ids
    assert proxy.ended == (drafted[-1:] != [] and drafted[-1] in pair.special.to_target)
    if proxy.ended:
        *ordinary, last = proxy.target_ids
        assert last == pair.special.to_target[drafted[-1]] and last in pair.target.token_bytes.special
    assert all(0 <= i < pair.target.token_bytes.size for i in ordinary)
    assert all(pair.target.token_bytes.pieces[i] is not None for i in ordinary)


@every_exact_pair
@given(draw=st.data())
@few
def test_proposals_of_exact_vocabularies_spell_the_drafted_bytes(names, draw):
    pair = load_pair(*names)
    drafted = drafted_by(draw, pair)
    missing = bytes(byte for byte, i in enumerate(pair.target.token_bytes.byte_ids()) if i < 0)
    spelled = pair.target.token_bytes.decode(retokenize(pair, drafted).target_ids)
    assert spelled == pair.draft.token_bytes.decode(drafted).translate(None, missing)


@every_pair
@given(draw=st.data())
@few
def test_blocks_cut_both_sides_without_a_gap(names, draw):
    pair = load_pair(*names)
    drafted = drafted_by(draw, pair)
    proxy = retokenize(pair, drafted)
    blocks = align(pair, drafted, proxy)
    assert blocks.dtype == np.int32 and blocks.shape[1:] == (4,)
    num_draft, num_target = len(drafted), len(proxy.target_ids)
    if proxy.ended:
        assert blocks[-1].tolist() == [num_draft - 1, num_draft, num_target - 1, num_target]
    if not pair.exact and proxy.ended in (num_draft, num_target):
        return  # Nothing but the end to put opposite anything.
    assert [0, *blocks[:, 1].tolist()] == [*blocks[:, 0].tolist(), num_draft]
    assert [0, *blocks[:, 3].tolist()] == [*blocks[:, 2].tolist(), num_target]


@every_exact_pair
@given(draw=st.data())
@few
def test_the_blocks_of_exact_vocabularies_end_where_both_sides_end_a_token(names, draw):
    pair = load_pair(*names)
    drafted = drafted_by(draw, pair)
    proxy = retokenize(pair, drafted)
    draft_ends = ends(len(pair.draft.token_bytes[i]) for i in drafted)
    target_ends = ends(len(pair.target.token_bytes[i]) for i in proxy.target_ids)
    if draft_ends[-1] != target_ends[-1]:
        return  # The target cannot spell some of the bytes.
    blocks = align(pair, drafted, proxy).tolist()
    common = sorted(set(draft_ends) & set(target_ends))
    spans = [(draft_ends[i], draft_ends[j]) for i, j, _, _ in blocks]
    assert spans == [(target_ends[i], target_ends[j]) for _, _, i, j in blocks]
    special = [(common[-1], common[-1])] if proxy.ended else []
    assert spans == [*pairwise(common), *special]


@every_exact_pair
@given(draw=st.data())
@few
def test_the_drafted_tokens_that_stand_are_those_up_to_the_last_common_end_within_the_accepted(names, draw):
    pair = load_pair(*names)
    drafted = drafted_by(draw, pair)
    proxy = retokenize(pair, drafted)
    accepted = draw.draw(st.integers(0, len(proxy.target_ids)), label="accepted")
    draft_ends = ends(len(pair.draft.token_bytes[i]) for i in drafted)
    target_ends = ends(len(pair.target.token_bytes[i]) for i in proxy.target_ids)
    if draft_ends[-1] != target_ends[-1]:
        return
    expected = (0, 0)
    for num_target in range(accepted + 1):
        for num_draft in range(len(drafted) + 1):
            # A special token has no bytes, so its end is told by the tokens.
            both_ended = proxy.ended and num_target == len(proxy.target_ids) and num_draft == len(drafted)
            neither_ended = not proxy.ended or (num_target < len(proxy.target_ids) and num_draft < len(drafted))
            if draft_ends[num_draft] == target_ends[num_target] and (both_ended or neither_ended):
                expected = (num_draft, num_target)
    assert aligned_draft_tokens(align(pair, drafted, proxy), accepted) == expected


@pytest.mark.parametrize(
    ("accepted", "standing"), [(0, (0, 0)), (1, (2, 1)), (2, (3, 2)), (3, (3, 2)), (4, (4, 4)), (9, (4, 4))]
)
def test_only_whole_blocks_stand(accepted, standing):
    blocks = np.array([[0, 2, 0, 1], [2, 3, 1, 2], [3, 4, 2, 4]], dtype=np.int32)
    assert aligned_draft_tokens(blocks, accepted) == standing


def test_without_blocks_nothing_stands():
    assert aligned_draft_tokens(np.zeros((0, 4), dtype=np.int32), 3) == (0, 0)


@every_pair
def test_nothing_drafted_proposes_nothing(names):
    pair = load_pair(*names)
    assert retokenize(pair, []) == Proxy([], ended=False)
    assert align(pair, [], Proxy([])).shape == (0, 4)


def test_words_that_both_sides_have_are_blocks_of_one_to_one(embedded):
    pair = embedded.pair
    drafted = pair.draft.encoder.encode(b" the and was")
    proxy = retokenize(pair, drafted)
    assert proxy.target_ids == pair.target.encoder.encode(b" the and was")
    assert align(pair, drafted, proxy).tolist() == [[i, i + 1, i, i + 1] for i in range(3)]


def test_half_a_character_is_proposed_in_bytes(embedded):
    pair = embedded.pair
    half = "世".encode()[:2]
    drafted = [pair.draft.token_bytes.byte_ids()[byte] for byte in half]
    proxy = retokenize(pair, drafted)
    assert pair.target.token_bytes.decode(proxy.target_ids) == half


def test_special_text_that_is_drafted_in_letters_stays_text(embedded):
    pair = embedded.pair
    text = b"<|im_end|><|endoftext|>"
    proxy = retokenize(pair, pair.draft.encoder.encode(text))
    assert not proxy.ended
    assert pair.target.token_bytes.decode(proxy.target_ids) == text


def test_the_end_of_a_drafted_text_is_the_end_of_the_targets(embedded):
    pair = embedded.pair
    end = pair.draft.special.by_role[Role.END]
    proxy = retokenize(pair, [end])
    assert proxy == Proxy([pair.target.special.by_role[Role.END]], ended=True)
    assert align(pair, [end], proxy).tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("text", ["<unk>", "<s>"])
def test_a_special_token_that_means_nothing_to_the_target_proposes_nothing(embedded, text):
    special_id = embedded.pair.draft.special.by_text[text]
    assert retokenize(embedded.pair, [special_id]) == Proxy([], ended=False)


@pytest.mark.parametrize("offset", [-1, 0, 100])
def test_an_id_outside_the_drafts_vocabulary_is_an_index_error(embedded, offset):
    token_id = -1 if offset < 0 else embedded.pair.draft.token_bytes.size + offset
    with pytest.raises(IndexError):
        retokenize(embedded.pair, [token_id])
