"""How large the draft's KV cache is, and how long a sequence in it may be."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_tokentiming.config import SettingsError

_GIB = 1 << 30
# Draft tokens for a target token, beyond which a request goes on without proposals. For nearly all pairs and languages
# of `benchmarks/PAIRS.md` whose tokenizers can spell every text, the mean is lower.
_MOST_DRAFT_TOKENS = 4


@dataclass(frozen=True)
class KVSize:
    """The size of the draft's KV cache.

    Attributes:
        num_bytes: Of the whole cache.
        max_model_len: Longest sequence, in draft tokens.
    """

    num_bytes: int
    max_model_len: int


def longest_sequence(draft_max_len: int, target_max_len: int, max_draft_tokens: int) -> int:
    """Return the longest sequence of the draft's that the longest text of the target needs.

    Args:
        draft_max_len: Longest sequence that the draft model allows, in draft tokens.
        target_max_len: Longest text of the target, in target tokens.
        max_draft_tokens: Most draft tokens written after a text in a step.
    """
    return min(draft_max_len, _MOST_DRAFT_TOKENS * target_max_len + max_draft_tokens)


def kv_size(
    *,
    draft_max_len: int,
    target_max_len: int,
    max_draft_tokens: int,
    max_num_seqs: int,
    block_size: int,
    block_bytes: int,
    budget_bytes: int,
    kv_memory_gib: float | None = None,
) -> KVSize:
    """Size the draft's KV cache.

    By default the cache holds ``max_num_seqs`` of the longest sequences, within the budget. A sequence is never longer
    than the draft allows, than the target's longest text needs, or than fits into the budget.

    Args:
        draft_max_len: Longest sequence that the draft model allows, in draft tokens.
        target_max_len: Longest text of the target, in target tokens.
        max_draft_tokens: Most draft tokens written after a text in a step.
        max_num_seqs: Most requests at a time.
        block_size: Tokens in a block.
        block_bytes: Bytes of a block in all layers.
        budget_bytes: Most memory by default.
        kv_memory_gib: What the user wants instead.

    Raises:
        SettingsError: What the user wants does not hold one sequence.
    """
    longest = longest_sequence(draft_max_len, target_max_len, max_draft_tokens)
    row_blocks = -(-longest // block_size)
    # One block more: block 0 is never handed out.
    if kv_memory_gib is None:
        num_blocks = max(2, min(max_num_seqs * row_blocks + 1, budget_bytes // block_bytes))
        return KVSize(num_blocks * block_bytes, min(longest, (num_blocks - 1) * block_size))
    least = (row_blocks + 1) * block_bytes
    if kv_memory_gib * _GIB < least:
        raise SettingsError(
            f"tokentiming: kv_memory_gib is {kv_memory_gib}, but one request of {longest} draft tokens needs "
            f"{least / _GIB:.3f}; raise kv_memory_gib or lower max_model_len."
        )
    return KVSize(int(kv_memory_gib * _GIB), longest)
