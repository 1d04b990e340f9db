"""The index of n-grams against its oracle, and what is learned from copies that were proposed and that were not."""

import numpy as np
import pytest
from conftest import examples
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_tokentiming.draft._ngrams import NgramIndex
from vllm_tokentiming.draft.repeats import Outcomes, Repeats

VOCAB_SIZE, LENGTHS, LONGEST_MATCH = 100, (8, 4, 2), 16


def ids(values):
    return np.array(values, dtype=np.int32)


def common_end(one, other):
    """How many ids two texts have in common at their ends, up to the first that is in no vocabulary."""
    number = 0
    for left, right in zip(reversed(one), reversed(other), strict=False):
        if left != right or not 0 <= left < VOCAB_SIZE:
            break
        number += 1
    return number


def reference(text, max_len):
    """What the index returns, by looking at every position of the text."""
    for length in LENGTHS:
        found = [end for end in range(1, len(text)) if common_end(text[:end], text) >= length]
        if found:
            start, proposed = found[-1], list(text)
            for _ in range(max_len):
                proposed.append(proposed[start + len(proposed) - len(text)])
            proposed = proposed[len(text) :]
            broken = [place for place, target_id in enumerate(proposed) if not 0 <= target_id < VOCAB_SIZE]
            return proposed[: min(broken, default=max_len)], min(common_end(text[:start], text), LONGEST_MATCH)
    return [], 0


@st.composite
def texts(draw):
    """Texts of few ids, some of them in no vocabulary, with parts that come again."""
    parts = draw(st.lists(st.lists(st.sampled_from([0, 1, 2, 99, 99, -1, 100]), max_size=12), min_size=1, max_size=4))
    order = draw(st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=12))
    return [target_id for part in order for target_id in parts[part]]


@given(texts(), st.lists(st.integers(0, 150), max_size=4), st.integers(0, 7))
@example([1, 2, 3] * 9, [4], 7)
@example([1] * 40, [], 5)
@example([5, 6, 100, 7, 5, 6], [3], 4)
@examples(300)
def test_what_follows_is_what_the_oracle_finds_however_the_text_arrives(text, cuts, max_len):
    index, start = NgramIndex(VOCAB_SIZE), 0
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        index.append(ids(text[start:end]))
        assert index.propose(max_len) == reference(text[:end], max_len)
        start = end
    assert len(index) == len(text)


@pytest.mark.parametrize("period", [3, 700])
def test_a_long_text_is_remembered_to_its_beginning(period):
    generator = np.random.default_rng(0)
    text = [*generator.integers(0, VOCAB_SIZE, period), *generator.integers(0, VOCAB_SIZE, 5000)]
    index = NgramIndex(VOCAB_SIZE)
    index.append(ids([*text, *text[:period]]))
    proposed, matched = index.propose(6)
    assert proposed == text[period : period + 6]
    assert matched == min(period, LONGEST_MATCH)


def test_ids_of_any_layout_in_memory_are_read():
    index, other = NgramIndex(VOCAB_SIZE), NgramIndex(VOCAB_SIZE)
    text = ids([1, 9, 2, 9, 3, 9, 1, 9, 2, 9])
    text.flags.writeable = False
    index.append(text[::2])
    other.append(ids([1, 2, 3, 1, 2]))
    assert index.propose(4) == other.propose(4) == ([3, 1, 2, 3], 2)


def test_an_index_of_nothing_proposes_nothing():
    index = NgramIndex(VOCAB_SIZE)
    index.append(ids([]))
    assert index.propose(5) == ([], 0)
    index.append(ids([4, 4, 4]))
    assert index.propose(0) == ([], 2)


# What is learned.


class Request:
    """A request whose target writes a text, a few tokens in each step."""

    def __init__(self, text, num_prompt, others=None):
        self.text, self.num_target = ids(text), num_prompt
        self.repeats = Repeats(VOCAB_SIZE, others)
        self.repeats.follow(self.text, num_prompt)

    def step(self, number=1, copied=False, drafted=None):
        """Propose, have the target write some tokens, and return what could have been copied before."""
        copy = self.repeats.find(5)
        if copied and copy:
            self.repeats.num_copied = len(copy.target_ids)
        self.repeats.drafted = drafted
        self.num_target += number
        self.accepted = self.repeats.follow(self.text, self.num_target)
        return copy


def first_chance(repeats):
    copy = repeats.find(5)
    return copy.chances[0]


LINE = [10, 11, 12, 13, 14, 15, 16]


def test_a_copy_that_the_target_writes_is_expected_more_also_where_it_was_not_proposed():
    request = Request(LINE * 12, 4 * len(LINE))
    before = first_chance(request.repeats)
    for _ in range(20):
        request.step()
    assert first_chance(request.repeats) > before > 0.8


def test_a_copy_that_the_target_does_not_write_is_expected_less_and_more_again():
    # After the same two ids there is always another one, and later on always the same one; then something else.
    changes, stays = [(1, 2, other) for other in range(10, 50)], [(1, 2, 60, other) for other in range(61, 91)]
    text = [target_id for line in changes + stays for target_id in line]
    request = Request(text, 3)
    chances = []
    while request.num_target + 1 < len(text):
        copy = request.step()
        if copy and copy.kind == 0 and text[request.num_target - 3 : request.num_target - 1] == [1, 2]:
            chances.append(copy.chances[0])
    assert len(chances) == len(changes) + len(stays) - 1
    # In the end every other copy after so short a match is accepted: that of 60, and not that of what follows it.
    assert chances[len(changes)] < 0.1 < chances[0] < 0.4 < chances[-1] < 0.6


def test_accepted_copies_are_counted():
    request = Request(LINE * 4, 2 * len(LINE))
    request.step(number=3, copied=True)
    assert request.accepted == 3
    request.step(number=2, copied=False)
    assert request.accepted == 0


def test_what_lies_behind_the_text_that_is_known_counts_neither_way():
    outcomes = Outcomes.expected()
    request = Request(LINE * 4, 2 * len(LINE), outcomes)
    kind = request.repeats.find(5).kind
    later = outcomes.later[kind].number
    request.step(number=1)
    assert outcomes.later[kind].number == later, "one token says nothing about the second"


def test_a_draft_that_does_well_is_expected_to_do_so():
    request = Request(LINE * 12, 2 * len(LINE))
    before = request.repeats.expected_of_draft
    for _ in range(10):
        proposed = request.text[request.num_target : request.num_target + 4].tolist()
        request.step(number=5, drafted=(proposed, 6))
    assert before < request.repeats.expected_of_draft <= 4
    assert 4 < request.repeats.expected_passes <= 6
    done_well = request.repeats.expected_of_draft
    for _ in range(10):
        request.step(number=1, copied=True)
    assert before < request.repeats.expected_of_draft < done_well, "what is not tried is forgotten"


def test_requests_learn_from_each_other_but_for_those_with_a_seed():
    outcomes = Outcomes.expected()
    lines = [target_id for other in range(20, 40) for target_id in (*LINE[:4], other)]

    def chances():
        return [first_chance(Request(lines[:9], 9, others).repeats) for others in (outcomes, None)]

    shared, alone = chances()
    request = Request(lines, 5, outcomes)
    while request.num_target + 1 < len(lines):
        request.step()
    assert shared == alone
    assert chances()[0] < shared and chances()[1] == alone


def test_placeholders_are_not_copied():
    text = [1, 2, 50, 50, 3, 4, 1, 2]
    repeats = Repeats(VOCAB_SIZE, None)
    repeats.follow(ids(text), 8, ((2, 4),))
    assert repeats.find(5) is None, "nothing but a placeholder follows"
    in_parts = Repeats(VOCAB_SIZE, None)
    for end in (3, 5, 8):
        in_parts.follow(ids(text), end, ((2, 4),))
    assert in_parts.find(5) is None
    assert in_parts.num_target == 8
    plain = Repeats(VOCAB_SIZE, None)
    plain.follow(ids(text), 8)
    assert plain.find(2).target_ids == [50, 50]
