"""The draft's own law, and draws from it.

The law ``Q`` is the draft's next-token distribution at the request's temperature, with the request's top-k, top-p and
min-p, over what may be drafted, times the alignment prior. Whatever shapes it here is part of its definition: a token
is drawn from exactly the ``Q`` that is returned.

**Randomness.** A draw uses one uniform number, which depends on the request's seed, the position in the target's
text, and the pass alone: not on the batch, not on the rank, and not on the generator that the target samples with.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_tokentiming.tensors import upload

# Logits ``[n, size]``, top-k and top-p ``[n]``, or ``None`` for all; to logits with -inf for what is cut off.
Truncate = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
_WORDS = struct.Struct("<8Q")


@dataclass(frozen=True)
class DraftSampling:
    """How a sampled request's draft is drawn.

    Attributes:
        seed: 64 bits, the same on every rank.
        temperature: Above 0.
        top_k: 0 for all.
        top_p: 1 for all.
        min_p: 0 for all.
    """

    seed: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def seed_of(request_id: str, seed: int | None, draft_seed: int = 0) -> int:
    """Return the draft's seed for a request: from the request's seed, else from its id, and from the user's seed."""
    text = f"{draft_seed} " + (f"seed {seed}" if seed is not None else f"id {request_id}")
    return int.from_bytes(hashlib.blake2b(f"tokentiming draft {text}".encode(), digest_size=8).digest(), "little")


def uniforms(seed: int, position: int, number: int) -> list[float]:
    """Return ``number`` uniform numbers in [0, 1), one for each pass of a step that begins at a position.

    A hash of where they belong: setting numpy's Philox up for so few of them takes several times as long.
    """
    numbers: list[float] = []
    for block in range(-(-number // 8)):
        words = _WORDS.unpack(hashlib.blake2b(b"%d %d %d" % (seed, position, block)).digest())
        numbers += [(word >> 11) * 2.0**-53 for word in words]
    return numbers[:number]


def law(
    logits: torch.Tensor,
    sampling: Sequence[DraftSampling],
    truncate: Truncate,
    log_prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shape logits into laws.

    Args:
        logits: ``[n, draft vocabulary]``, with -inf for what must not be drafted; overwritten.
        sampling: One for each row.
        truncate: Cuts off what top-k and top-p leave out, as the target's sampler does.
        log_prior: ``[draft vocabulary]``, logarithms of what the laws are multiplied by before they are truncated.

    Returns:
        ``[n, draft vocabulary] float32``; each row sums to 1.
    """
    device, vocab = logits.device, logits.shape[1]
    logits = logits.float().div_(upload([s.temperature for s in sampling], device).unsqueeze(1))
    if log_prior is not None:
        logits += log_prior
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


def draw(probs: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """Draw one token from each law by inverting its distribution function.

    Args:
        probs: ``[n, draft vocabulary]``, rows that sum to 1.
        uniform: ``[n]``, in [0, 1).

    Returns:
        Draft ids ``[n] int64``; never one whose probability is 0.
    """
    below = probs.cumsum(-1, dtype=torch.float64)
    point = upload(uniform, probs.device, torch.float64).unsqueeze(1) * below[:, -1:]
    # The first token whose cumulated probability exceeds the point.
    return torch.searchsorted(below, point, right=True).squeeze(1).clamp_(max=probs.shape[1] - 1)
