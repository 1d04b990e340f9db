"""The alignment kernels against their oracles, the promises about their results, examples, and refusals."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import reference_alignment as reference
from conftest import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st

from vllm_tokentiming.align import dtw as alignment
from vllm_tokentiming.align.dtw import span_blocks, warp

# "!" and "a" are 64 apart: the kernel's quick test for "no byte in common" cannot tell them from each other.
LETTERS = [b" ", b"a", b"b", b"!"]


def words(min_size=0, max_size=6):
    """Few letters, so that distances vary and ties abound."""
    return st.lists(st.sampled_from(LETTERS), min_size=min_size, max_size=max_size).map(b"".join)


def pieces(max_size=9, piece=None):
    return st.lists(words() if piece is None else piece, min_size=1, max_size=max_size)


@st.composite
def cuts_of_one_text(draw, max_tokens=12, empty_tokens=False):
    """Two lists of pieces that spell the same bytes; `empty_tokens` allows pieces without any."""
    text = draw(st.binary(min_size=2, max_size=30))
    places = st.integers(0, len(text)) if empty_tokens else st.integers(1, len(text) - 1)
    sides = []
    for _ in range(2):
        cuts = draw(st.lists(places, max_size=max_tokens - 1, unique=not empty_tokens))
        sides.append([text[start:end] for start, end in pairwise([0, *sorted(cuts), len(text)])])
    return sides


def lengths_of(side):
    return [len(piece) for piece in side]


def tuples(rows):
    return [tuple(row) for row in rows.tolist()]


def assert_cover(blocks, n, m):
    """The blocks follow each other on both sides, from the first tokens to the last ones."""
    assert blocks[0][0] == blocks[0][2] == 0
    assert blocks[-1][1] == n and blocks[-1][3] == m
    assert all(a[1] == b[0] and a[3] == b[2] for a, b in pairwise(blocks))
    assert all(i1 - i0 + j1 - j0 > 0 and i0 <= i1 and j0 <= j1 for i0, i1, j0, j1 in blocks)


def assert_warp_matches(draft, target, window):
    """Blocks and cost are the oracle's, and the blocks are what every result promises."""
    blocks, cost = warp(draft, target, window=window)
    expected_cost, path = reference.levenshtein_warp(draft, target, window)
    assert blocks.dtype == np.int32 and blocks.ndim == 2
    assert tuples(blocks) == reference.blocks_of_path(path)
    assert cost == float(expected_cost)
    assert_cover(tuples(blocks), len(draft), len(target))
    assert all(i0 < i1 and j0 < j1 for i0, i1, j0, j1 in tuples(blocks))


def pieces_of(lengths):
    """Pieces of these lengths; the scan looks at nothing else."""
    return [b"x" * length for length in lengths]


def scanned(draft_lengths, target_lengths):
    return tuples(span_blocks(pieces_of(draft_lengths), pieces_of(target_lengths)))


# The edit distance, seen through sequences of one token.


@given(words(max_size=12), words(max_size=12))
def test_the_edit_distance_of_short_pieces_is_the_textbook_one(draft_piece, target_piece):
    assert_warp_matches([draft_piece], [target_piece], 1)


@given(st.binary(max_size=8), st.binary(max_size=8))
def test_the_edit_distance_holds_for_any_bytes(draft_piece, target_piece):
    assert_warp_matches([draft_piece], [target_piece], 1)


@examples(60)
@given(words(min_size=60, max_size=70), words(max_size=140))
@example(b"ab" * 32, b"ba" * 32)  # 64: the last that fits a machine word
@example(b"ab" * 32 + b"a", b"ba" * 40)  # 65: the first that does not
@example(b"a" * 64, b"a" * 63 + b"b")
@example(b"a" * 65, b"b" + b"a" * 64)
def test_the_edit_distance_is_the_same_below_and_above_a_machine_word(draft_piece, target_piece):
    assert_warp_matches([draft_piece], [target_piece], 1)
    assert_warp_matches([target_piece], [draft_piece], 1)


# The warp.


@given(pieces(), pieces(), st.integers(1, 10))
def test_warps_match_the_oracle(draft, target, window):
    assert_warp_matches(draft, target, window)


@given(pieces(piece=st.binary(max_size=3)), pieces(piece=st.binary(max_size=3)), st.integers(1, 10))
def test_warps_match_the_oracle_on_any_bytes(draft, target, window):
    assert_warp_matches(draft, target, window)


@given(st.lists(words(max_size=2), min_size=8, max_size=14), st.integers(-1, 1), st.data())
def test_warps_match_the_oracle_in_the_narrowest_band(draft, surplus, data):
    m = len(draft) + surplus
    target = data.draw(st.lists(words(max_size=2), min_size=m, max_size=m))
    assert_warp_matches(draft, target, 1)


@examples(30)
@given(pieces(4, words(max_size=3)), st.lists(words(max_size=3), min_size=34, max_size=70), st.integers(1, 80))
def test_warps_match_the_oracle_when_one_side_has_far_more_tokens(short, long, window):
    assert_warp_matches(short, long, window)
    assert_warp_matches(long, short, window)


@examples(15)
@given(st.data(), st.integers(33, 40), st.integers(33, 40), st.sampled_from([2, 8, 16, 50]))
def test_warps_match_the_oracle_on_long_sequences(data, n, m, window):
    draft = data.draw(st.lists(words(max_size=2), min_size=n, max_size=n))
    target = data.draw(st.lists(words(max_size=2), min_size=m, max_size=m))
    assert_warp_matches(draft, target, window)


@examples(30)
@given(pieces(4, words(max_size=90)), pieces(4, words(max_size=90)), st.integers(1, 4))
@example([b"a" * 70, b"b" * 80, b"ab"], [b"ab" * 40, b"a", b"b" * 66], 1)
def test_warps_match_the_oracle_where_long_and_short_pieces_mix(draft, target, window):
    assert_warp_matches(draft, target, window)


@given(pieces(), st.integers(1, 9))
def test_a_sequence_aligned_with_itself_is_one_to_one_and_costs_nothing(side, window):
    blocks, cost = warp(side, side, window=window)
    assert (tuples(blocks), cost) == ([(k, k + 1, k, k + 1) for k in range(len(side))], 0)


# The scan.

token_lengths = st.lists(st.integers(0, 4), max_size=20)


@given(token_lengths, token_lengths)
@example([0, 2], [0, 2])
@example([0], [0, 3])
@example([2, 0, 0], [0, 2, 3])
@example([0, 0], [0])
def test_the_scan_matches_the_oracle_for_any_lengths(draft_lengths, target_lengths):
    assume(draft_lengths or target_lengths)
    blocks = span_blocks(pieces_of(draft_lengths), pieces_of(target_lengths))
    assert blocks.dtype == np.int32
    assert tuples(blocks) == reference.blocks_of_offsets(draft_lengths, target_lengths)
    assert_cover(tuples(blocks), len(draft_lengths), len(target_lengths))


@given(cuts_of_one_text(empty_tokens=True))
def test_the_scan_matches_the_oracle_where_both_sides_spell_the_same_bytes(sides):
    draft, target = sides
    blocks = tuples(span_blocks(draft, target))
    assert blocks == reference.blocks_of_offsets(lengths_of(draft), lengths_of(target))
    assert all(b"".join(draft[i0:i1]) == b"".join(target[j0:j1]) for i0, i1, j0, j1 in blocks)


# Examples by hand.


def test_a_word_cut_differently_lies_between_the_words_around_it():
    draft = [b"The", b" un", b"believ", b"able", b" end"]
    target = [b"The", b" unb", b"elie", b"vable", b" end"]
    warped = tuples(warp(draft, target)[0])
    assert warped[0] == (0, 1, 0, 1) and warped[-1] == (4, 5, 4, 5)
    assert tuples(span_blocks(draft, target)) == [(0, 1, 0, 1), (1, 4, 1, 4), (4, 5, 4, 5)]


def test_two_tokens_against_three_that_overlap_all_along_are_one_block():
    assert scanned([3, 3], [2, 2, 2]) == [(0, 2, 0, 3)]


def test_where_one_side_ends_on_a_boundary_the_scan_gives_the_tail_a_block_of_its_own():
    assert scanned([2, 2, 1], [2, 2]) == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 2)]
    assert scanned([2], [2, 1, 1]) == [(0, 1, 0, 1), (1, 1, 1, 3)]
    assert scanned([], [3, 1]) == [(0, 0, 0, 2)]


def test_where_one_side_ends_within_a_token_the_last_block_begins_at_the_last_common_boundary():
    assert scanned([2, 3, 1], [2, 2]) == [(0, 1, 0, 1), (1, 3, 1, 2)]
    assert scanned([2, 1], [2, 5]) == [(0, 1, 0, 1), (1, 2, 1, 2)]


def test_the_warp_puts_a_tail_without_counterpart_into_the_last_block():
    blocks, _ = warp([b"ab", b"cd", b"e"], [b"ab", b"cd"])
    assert tuples(blocks) == [(0, 1, 0, 1), (1, 3, 1, 2)]


def test_tokens_without_bytes_join_the_block_that_ends_where_they_stand():
    assert scanned([2, 0, 1], [2, 1, 0]) == [(0, 2, 0, 1), (2, 3, 1, 3)]
    assert scanned([0, 2], [2]) == [(0, 2, 0, 1)]
    assert scanned([0], [0, 0]) == [(0, 1, 0, 2)]


def test_leading_spaces_do_not_count_but_other_spaces_do():
    assert warp([b" the"], [b"the"])[1] == 0
    assert warp([b"   "], [b""])[1] == 0
    assert warp([b"a b"], [b"ab"])[1] == pytest.approx(1 / 3)
    assert warp([b"the "], [b"the"])[1] == 0.25
    assert warp([b"\tthe"], [b"the"])[1] == 0.25


def test_the_local_cost_is_the_share_of_edits_in_the_longer_piece():
    assert warp([b"kitten"], [b"sitting"])[1] == pytest.approx(3 / 7)
    assert warp([b"abc"], [b""])[1] == 1
    assert warp([b""], [b""])[1] == 0


def test_letters_with_an_accent_are_compared_byte_by_byte():
    assert warp(["é".encode()], ["è".encode()])[1] == 0.5


def test_among_equal_paths_the_last_step_is_diagonal_or_else_the_draft_advances():
    assert tuples(warp([b"x", b"x"], [b"x", b"x"])[0]) == [(0, 1, 0, 1), (1, 2, 1, 2)]
    # Every path costs 0, and the one that takes its diagonal step last wins: (0, 0), (1, 0), (2, 1).
    assert tuples(warp([b"x", b"x", b"x"], [b"x", b"x"])[0]) == [(0, 2, 0, 1), (2, 3, 1, 2)]
    # Two paths cost 2, through (1, 2) and through (2, 1), and the one through (1, 1) costs 3.
    assert tuples(warp([b"", b"x", b""], [b"x", b"", b"x"])[0]) == [(0, 1, 0, 2), (1, 3, 2, 3)]


def test_a_side_without_tokens_gives_no_blocks_and_no_cost():
    for draft, target in (([], []), ([b"a"], []), ([], [b"a", b"b"])):
        blocks, cost = warp(draft, target)
        assert blocks.shape == (0, 4) and blocks.dtype == np.int32
        assert cost == 0
    assert span_blocks([], []).shape == (0, 4)


def test_a_window_beyond_both_sides_is_the_whole_matrix():
    draft, target = [b"a", b"b", b"a"], [b"b", b"a"]
    assert tuples(warp(draft, target, window=sys.maxsize)[0]) == tuples(warp(draft, target, window=3)[0])


def test_any_sequence_of_pieces_will_do():
    assert tuples(warp((b"ab",), [b"a", b"b"])[0]) == [(0, 1, 0, 2)]
    assert tuples(span_blocks((b"ab",), [b"a", b"b"])) == [(0, 1, 0, 2)]


def test_threads_do_not_disturb_each_other():
    jobs = [([b"ab", b"c", b"d"] * size, [b"a", b"bc", b"d" * 70] * size) for size in range(1, 20)]
    alone = [warp(*job)[0].tolist() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: warp(*job)[0].tolist(), jobs * 5))
    assert together == alone * 5


# Refusals.


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_below_one_is_refused(window):
    with pytest.raises(ValueError, match=f"at least 1, got {window}"):
        warp([b"a"], [b"a"], window=window)


@pytest.mark.parametrize("sides", [(["a"], [b"a"]), ([b"a"], [bytearray(b"a")]), (b"ab", [b"a"]), ([b"a"], [None])])
@pytest.mark.parametrize("align", [warp, span_blocks])
def test_pieces_that_are_not_bytes_are_refused(align, sides):
    with pytest.raises(TypeError):
        align(*sides)


@pytest.mark.parametrize("kernel", ["_dtw", "_spans"])
def test_without_a_compiled_kernel_the_import_says_what_to_run(kernel, monkeypatch):
    monkeypatch.delattr(f"vllm_tokentiming.align.{kernel}")  # Or it is taken from the package that was imported.
    monkeypatch.setitem(sys.modules, f"vllm_tokentiming.align.{kernel}", None)
    spec = importlib.util.spec_from_file_location("alignment_without_kernels", alignment.__file__)
    with pytest.raises(ImportError, match=r"were not built .* `pip install \.` .* C compiler"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
