"""The online transducer, held to plain oracles."""

import itertools

import numpy as np
import pytest
from conftest import EMBEDDED, EXACT, cases, examples, load_pair, texts
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokentiming.align.transducer import Transducer, incomplete_tail
from vllm_tokentiming.vocab.special_tokens import Role

PAIRS = [EMBEDDED, ("qwen2.5", "llama2"), ("llama3", "gpt2"), ("llama2", "mistral_tekken")]


@pytest.fixture(scope="module", params=cases(PAIRS), ids=lambda pair: " from ".join(pair))
def transducer(request):
    return Transducer(load_pair(*request.param))


def ordinary_ids(transducer):
    return np.flatnonzero(transducer._pair.draft.token_bytes.lengths > 0).tolist()


@pytest.fixture(scope="module")
def beginnings():
    """Every proper beginning of every UTF-8 character."""
    characters = (chr(i).encode() for i in range(0x80, 0x110000) if not 0xD800 <= i < 0xE000)
    return {character[:length] for character in characters for length in range(1, len(character))}


def test_an_incomplete_tail_is_the_beginning_of_a_character(beginnings):
    def check(data):
        tails = [length for length in (1, 2, 3) if data[-length:] in beginnings and length <= len(data)]
        assert incomplete_tail(data) == (tails[0] if tails else 0)

    for pair in itertools.product(range(256), repeat=2):
        check(bytes(pair))
        check(bytes(pair) + b"\x80")
        check(bytes(pair) + b"\xbf")
    examples(1000)(given(st.binary(max_size=8) | texts.map(lambda text: text.encode()[-6:]))(check))()


def test_what_is_emitted_and_what_is_pending_spell_what_was_drafted(transducer):
    ids = ordinary_ids(transducer)
    draft_bytes, target_bytes = transducer._pair.draft.token_bytes, transducer._pair.target.token_bytes

    @examples(150)
    @given(st.lists(st.sampled_from(ids), max_size=8))
    def check(draft_ids):
        pending, emitted = b"", []
        for draft_id in draft_ids:
            target_ids, pending = transducer.emit(pending, draft_id)
            emitted += target_ids
            assert len(pending) <= 3 and incomplete_tail(pending) == len(pending)
        assert target_bytes.decode(emitted) + pending == draft_bytes.decode(draft_ids)
        assert not any(target_id in target_bytes.special for target_id in emitted)

    check()


def test_the_table_says_what_emission_with_nothing_pending_gives(transducer):
    for draft_id in np.flatnonzero(transducer.draftable)[::37].tolist():
        transducer_without_table = Transducer.__new__(Transducer)
        transducer_without_table.__dict__ = {**transducer.__dict__, "count": np.zeros_like(transducer.count)}
        target_ids, pending = transducer_without_table.emit(b"", draft_id)
        assert transducer.count[draft_id] == len(target_ids)
        assert transducer.first[draft_id] == (target_ids[0] if target_ids else -1)
        assert transducer.emit(b"", draft_id) == (target_ids, pending)


def test_what_may_not_be_drafted_emits_nothing(transducer):
    never = ~transducer.draftable
    assert (~transducer._pair.draftable <= never).all()
    assert (transducer.first[never] == -1).all() and (transducer.count[never] == 0).all()


def test_alternatives_are_the_draft_tokens_whose_emission_begins_alike_and_goes_on(transducer):
    longer = np.flatnonzero(transducer.count > 1)
    assert len(longer)
    everything = {i: transducer.emit(b"", i)[0] for i in longer.tolist()}
    for draft_id in longer[:: max(1, len(longer) // 40)].tolist():
        emission = everything[draft_id]
        for depth in range(1, len(emission)):
            draft_ids, next_ids = transducer.alternatives(tuple(emission[:depth]))
            alike = {i: e[depth] for i, e in everything.items() if len(e) > depth and e[:depth] == emission[:depth]}
            assert dict(zip(draft_ids.tolist(), next_ids.tolist(), strict=True)) == alike


def test_the_end_of_text_crosses_alone_and_after_pending_bytes(embedded):
    transducer = Transducer(embedded.pair)
    draft_end = embedded.pair.draft.special.by_role[Role.END]
    target_end = embedded.pair.target.special.by_role[Role.END]
    assert transducer.emit(b"", draft_end) == ([target_end], b"")
    target_ids, pending = transducer.emit("é".encode()[:1], draft_end)
    assert pending == b"" and target_ids[-1] == target_end
    assert embedded.pair.target.token_bytes.decode(target_ids) == "é".encode()[:1]


@pytest.mark.parametrize("names", cases(PAIRS), ids=lambda pair: " from ".join(pair))
def test_in_the_intersection_every_draft_token_is_one_target_token_of_the_same_bytes(names):
    pair = load_pair(*names)
    transducer = Transducer(pair, one_to_one=True)
    ids = np.flatnonzero(transducer.draftable).tolist()
    assert len(ids) > 100
    for draft_id in ids[::11]:
        (target_id,), pending = transducer.emit(b"", draft_id)
        assert pending == b""
        if draft_id not in pair.special.to_target:
            assert pair.target.token_bytes[target_id] == pair.draft.token_bytes[draft_id]


@pytest.mark.parametrize("name", cases(EXACT))
def test_with_one_vocabulary_on_both_sides_every_token_emits_its_own_bytes_as_one_token(name):
    pair = load_pair(name, name)
    transducer = Transducer(pair)
    ids = np.array(pair.target.encoder.encode("A plain sentence, 日本語, and\n\tsome code: f(x)".encode()))
    one_token = transducer.count[ids] == 1
    assert one_token.mean() > 0.7  # The others are parts of characters.
    assert (transducer.first[ids][one_token] == ids[one_token]).mean() > 0.95  # But for ids of the same bytes.
