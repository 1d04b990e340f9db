"""From logits to a distribution, and from a distribution to a token: temperature, learned weights, top-k, top-p, min-p.

The draft's distribution also depends on what may be drafted at all, which is decided in ``distribution.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.tensors import upload

# Logits ``[n, size]``, top-k and top-p ``[n]``, or ``None`` for all; to logits with -inf for what is cut off.
Truncate = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


class LogWeights(NamedTuple):
    """Logarithms of what some distributions are multiplied by.

    Attributes:
        rows: ``[n] float32``; 1 for those that are, 0 for the others.
        of_ids: ``[draft size] float32``, the logarithms.
    """

    rows: torch.Tensor
    of_ids: torch.Tensor


def shape(
    logits: torch.Tensor,
    sampling: Sequence[DraftSampling],
    truncate: Truncate,
    log_weights: LogWeights | None = None,
) -> torch.Tensor:
    """Shape logits into distributions.

    Args:
        logits: ``[n, draft size]``, with -inf for what must not be drafted; overwritten.
        sampling: One for each row.
        truncate: Cuts off what top-k and top-p leave out, as the target's sampler does.
        log_weights: What the distributions are multiplied by before they are truncated.

    Returns:
        ``[n, draft size] float32``; each row sums to 1.
    """
    device, vocab = logits.device, logits.shape[1]
    logits = logits.float().div_(upload([s.temperature for s in sampling], device).unsqueeze(1))
    if log_weights is not None:
        logits.addr_(*log_weights)
    top_k = top_p = None
    if any(0 < s.top_k < vocab for s in sampling):
        top_k = upload([s.top_k if 0 < s.top_k < vocab else vocab for s in sampling], device, torch.int32)
    if any(s.top_p < 1 for s in sampling):
        top_p = upload([s.top_p for s in sampling], device)
    probs = truncate(logits, top_k, top_p).softmax(-1)
    if any(s.min_p > 0 for s in sampling):
        least = probs.amax(-1, keepdim=True) * upload([s.min_p for s in sampling], device).unsqueeze(1)
        probs = probs.masked_fill_(probs < least, 0)
        probs /= probs.sum(-1, keepdim=True)
    return probs


def draw(probs: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Draw one token from each distribution by inverting its distribution function.

    Args:
        probs: ``[n, draft size]``, rows that sum to 1.
        uniforms: ``[n]``, in [0, 1).

    Returns:
        Draft ids ``[n] int64``; never one whose probability is 0.
    """
    below = probs.cumsum(-1, dtype=torch.float64)
    point = upload(uniforms, probs.device, torch.float64).unsqueeze(1) * below[:, -1:]
    # The first token whose cumulated probability exceeds the point.
    return torch.searchsorted(below, point, right=True).squeeze(1).clamp_(max=probs.shape[1] - 1)
