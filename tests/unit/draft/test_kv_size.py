"""The size of the draft's KV cache follows from what the target's requests can need, within a budget."""

from __future__ import annotations

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokentiming.config import SettingsError
from vllm_tokentiming.draft.kv_size import kv_size

GIB = 1 << 30
# A draft of one billion parameters with 131,072 positions, beside a target that is started with 4,096.
LONG_DRAFT = {
    "draft_max_len": 131_072,
    "target_max_len": 4_096,
    "max_draft_tokens": 12,
    "max_num_seqs": 256,
    "block_size": 16,
    "block_bytes": 16 * 32 * 1024,  # 32 KiB for each token.
    "budget_bytes": 2 * GIB,
}


def test_a_draft_with_many_positions_is_bounded_by_what_the_targets_length_can_need():
    size = kv_size(**LONG_DRAFT)
    assert size.max_model_len == 4 * 4_096 + 12
    assert size.num_bytes == 2 * GIB


def test_a_sequence_is_never_longer_than_the_draft_allows():
    assert kv_size(**{**LONG_DRAFT, "draft_max_len": 2_048}).max_model_len == 2_048


def test_few_requests_take_less_than_the_budget():
    size = kv_size(**{**LONG_DRAFT, "draft_max_len": 512, "max_num_seqs": 2})
    assert size.num_bytes == (2 * 512 // 16 + 1) * 16 * 32 * 1024


def test_a_budget_that_does_not_hold_one_request_shortens_the_sequences():
    size = kv_size(**{**LONG_DRAFT, "budget_bytes": GIB // 8})
    assert size.num_bytes == GIB // 8
    assert size.max_model_len == GIB // 8 // (32 * 1024) - 16  # Without the block that is never handed out.


def test_a_cache_of_the_users_that_does_not_hold_one_request_is_refused():
    with pytest.raises(
        SettingsError, match=r"kv_memory_gib is 0\.25, but one request of 16396 .* needs 0\.5\d\d; raise"
    ):
        kv_size(**LONG_DRAFT, kv_memory_gib=0.25)


def test_a_cache_of_the_users_is_as_large_as_they_say():
    assert kv_size(**LONG_DRAFT, kv_memory_gib=3).num_bytes == 3 * GIB


@examples(200)
@given(
    st.builds(
        dict,
        draft_max_len=st.integers(1, 200_000),
        target_max_len=st.integers(1, 200_000),
        max_draft_tokens=st.integers(1, 64),
        max_num_seqs=st.integers(1, 1024),
        block_size=st.sampled_from([16, 32, 128]),
        block_bytes=st.integers(1, 1 << 22),
        budget_bytes=st.integers(1 << 23, 1 << 36),
    )
)
def test_the_longest_sequence_always_fits_and_the_budget_always_holds(given):
    size = kv_size(**given)
    num_blocks = size.num_bytes // given["block_bytes"]
    assert 1 <= size.max_model_len <= (num_blocks - 1) * given["block_size"]
    assert size.num_bytes <= given["budget_bytes"]
