"""The interface of a draft model. Drafting needs no vLLM behind it: tests draft with stubs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_tokentiming.draft.kv_pool import KVPool


@dataclass
class Span:
    """Tokens of one sequence to run in a pass.

    Attributes:
        row: The sequence's row in the KV pool.
        start: Position of the first; everything before is in the cache already.
        draft_ids: The tokens.
    """

    row: int
    start: int
    draft_ids: Sequence[int]


class DraftModel(Protocol):
    """A draft model with a paged KV cache.

    Attributes:
        device: Where it runs.
        max_model_len: Longest sequence in draft tokens.
        max_batch_tokens: Most tokens in one pass.
        vocab_size: Columns of the logits.
        pool: Blocks of its KV cache.
    """

    device: torch.device
    max_model_len: int
    max_batch_tokens: int
    vocab_size: int
    pool: KVPool

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """Run one pass.

        Args:
            spans: At most ``max_batch_tokens`` tokens, shortest spans first. Each row has room for its tokens.

        Returns:
            Logits after the last token of each span, ``[len(spans), vocab_size]``.
        """
        ...
