"""Block verification: consecutive proposals of a request are accepted or refused together.

Sun et al., "Block Verification Accelerates Speculative Decoding" (ICLR 2025, arXiv 2403.10444), algorithm 2. Verified
one by one, a proposal that the target likes less than the draft ends the step, even if the target likes what follows
more. Verified together, the whole path counts. With ``M_i`` the target's distribution at position ``i``, ``q_i`` the
one that ``x_i`` was drawn from, and ``u_i`` uniform:

    p_0 = 1,  p_i = min(p_(i-1) M_i(x_i) / q_i(x_i), 1)
    Z_i = sum over t of (p_i M_(i+1)(t) - q_(i+1)(t))^+
    h_i = Z_i / (Z_i + 1 - p_i) for i < N,  h_N = p_N

The largest ``i`` with ``u_i < h_i`` is how many are accepted. What follows is drawn from ``(p_i M_(i+1) - q_(i+1))^+``,
or from ``M_(N+1)`` if all are. No other way to verify a single path accepts more on average, and one by one accepts
less or as much. The proof for distributions that depend on hidden draft tokens stands in ``docs/theory.md``.

**The random numbers belong to one step.** All ``u_i`` are looked at, also those of refused positions, so they may not
be used again when the next step verifies the same positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from vllm_tokentiming.tensors import upload

_MAX_LOGITS = 1 << 24  # Worked on at once, as in ``transfer/proposals.py``.
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Block:
    """Consecutive proposals of a request that are verified together.

    Attributes:
        target_ids: The proposals.
        target_row: The row of the target's logits for the first of them; those of the others follow.
        q_row: The same for ``q``.
        uniforms: A random number in [0, 1) for each proposal.
        prefix_ratios: ``p_0`` to ``p_N``, once they are known.
        residual_masses: ``Z_i`` by ``i``, of those that can matter.
    """

    target_ids: Sequence[int]
    target_row: int
    q_row: int
    uniforms: Sequence[float]
    prefix_ratios: list[float] = field(default_factory=lambda: [1.0])
    residual_masses: dict[int, float] = field(default_factory=dict)

    @property
    def target_rows(self) -> range:
        """Return all its rows of the target's logits."""
        return range(self.target_row, self.target_row + len(self.target_ids))

    @property
    def q_rows(self) -> range:
        """Return all its rows of ``q``."""
        return range(self.q_row, self.q_row + len(self.target_ids))

    def start(self, ratios: Sequence[float]) -> list[int]:
        """Take in ``M_i(x_i) / q_i(x_i)`` for each proposal.

        Returns:
            The positions whose residual mass decides how many are accepted.
        """
        for ratio in ratios:
            self.prefix_ratios.append(min(self.prefix_ratios[-1] * ratio, 1.0))
        last = len(self.target_ids)
        if self.uniforms[-1] < self.prefix_ratios[-1]:
            return []
        # Where the ratio is 1, h is 1, and nothing before it matters; where it is 0, h is 0.
        surely = max(i for i in range(last + 1) if self.prefix_ratios[i] >= 1)
        return [i for i in range(surely + 1, last) if self.prefix_ratios[i] > 0]

    def num_accepted(self) -> int:
        """Return how many proposals are accepted."""
        for i in range(len(self.target_ids), 0, -1):
            if self.uniforms[i - 1] < self.acceptance(i):
                return i
        return 0

    def acceptance(self, i: int) -> float:
        """Return ``h_i``, for an ``i`` that can matter."""
        ratio = self.prefix_ratios[i]
        if i == len(self.target_ids) or ratio >= 1 or ratio <= 0:
            return ratio
        mass = self.residual_masses[i]
        return mass / (mass + 1 - ratio)


def verify_blocks(
    target_logits: torch.Tensor, q: torch.Tensor, blocks: Sequence[Block]
) -> tuple[list[int], torch.Tensor]:
    """Verify blocks, and leave the rejection sampler rows with which it comes to the same decisions.

    Args:
        target_logits: ``[*, target size] float32``, as the requests shape them. Not changed.
        q: ``[*, target size] float32``. Rows of proposals that are decided are overwritten: accepted ones with half the
            target's probability, so that they are accepted whatever the sampler draws, and the first refused one of a
            block as one-hot.
        blocks: The blocks.

    Returns:
        The rows of ``target_logits`` of the first refused proposals, and ``[rows, target size] float32``, the logits
        that the rejection sampler is to see there. They have no probability for the proposal, which is surely refused,
        and else that of the residual.
    """
    probs = target_logits.softmax(-1)  # Not more than vLLM's sampler takes for the same, a moment later.
    probs_of_proposals = _start(probs, q, blocks)
    _add_residual_masses(probs, q, blocks)
    accepted: list[tuple[int, int, float]] = []
    refused: list[tuple[int, int, float]] = []
    refused_ids: list[int] = []
    first = 0
    for block in blocks:
        number = block.num_accepted()
        mine = probs_of_proposals[first : first + number]
        accepted += zip(block.q_rows[:number], block.target_ids[:number], mine, strict=True)
        if number < len(block.target_ids):
            refused.append((block.target_rows[number], block.q_rows[number], block.prefix_ratios[number]))
            refused_ids.append(block.target_ids[number])
        first += len(block.target_ids)
    rows = [row for row, *_ in refused]
    left = _residual_logits(probs, q, refused, refused_ids) if refused else target_logits[:0]
    _make_one_hot(q, [(q_row, target_id, 1.0) for (_, q_row, _), target_id in zip(refused, refused_ids, strict=True)])
    _make_one_hot(q, [(q_row, target_id, prob / 2) for q_row, target_id, prob in accepted])
    return rows, left


def _start(probs: torch.Tensor, q: torch.Tensor, blocks: Sequence[Block]) -> list[float]:
    """Start all blocks, and return the target's probabilities of all proposals."""
    device = probs.device
    places = [
        place for block in blocks for place in zip(block.target_rows, block.q_rows, block.target_ids, strict=True)
    ]
    target_rows, q_rows, target_ids = upload(places, device).unbind(1)
    of_target, of_draft = torch.stack([probs[target_rows, target_ids], q[q_rows, target_ids]]).tolist()
    # What the draft could not have drawn is not accepted.
    ratios = [p / q if q > 0 and p > 0 else 0.0 for p, q in zip(of_target, of_draft, strict=True)]
    first = 0
    for block in blocks:
        block.residual_masses = dict.fromkeys(block.start(ratios[first : first + len(block.target_ids)]), 0.0)
        first += len(block.target_ids)
    found: list[float] = of_target
    return found


def _add_residual_masses(probs: torch.Tensor, q: torch.Tensor, blocks: Sequence[Block]) -> None:
    places = [(block, i) for block in blocks for i in block.residual_masses]
    rows = [(block.target_rows[i], block.q_rows[i], block.prefix_ratios[i]) for block, i in places]
    if not rows:
        return
    masses = torch.cat([residuals.sum(-1) for residuals in _residuals(probs, q, rows)]).tolist()
    for (block, i), mass in zip(places, masses, strict=True):
        block.residual_masses[i] = mass


def _residual_logits(
    probs: torch.Tensor, q: torch.Tensor, rows: Sequence[tuple[int, int, float]], refused_ids: Sequence[int]
) -> torch.Tensor:
    """Return ``[n, target size]``, the logits of what is drawn in the place of refused proposals."""
    device = probs.device
    left = torch.cat(list(_residuals(probs, q, rows)))
    # The proposal has none by the definition; so this is rounding.
    left[torch.arange(len(rows), device=device), upload(refused_ids, device)] = 0
    for i in (left.sum(-1) <= 0).nonzero().flatten().tolist():  # By rounding alone.
        left[i] = probs[rows[i][0]]
    # The logarithm of 0 would be right, and takes ten times as long on CPUs.
    return left.clamp(min=_TINY).log_().masked_fill_(left < _TINY, float("-inf"))


def _residuals(probs: torch.Tensor, q: torch.Tensor, rows: Sequence[tuple[int, int, float]]) -> Iterator[torch.Tensor]:
    """Yield ``(p M - q)^+`` for rows of ``M``, of ``q``, and ``p``, several at a time."""
    device = probs.device
    indices = upload([(target_row, q_row) for target_row, q_row, _ in rows], device)
    ratios = upload([ratio for *_, ratio in rows], device)
    number = max(1, _MAX_LOGITS // probs.shape[1])
    for first in range(0, len(rows), number):
        target_rows, q_rows = indices[first : first + number].unbind(1)
        scale = ratios[first : first + number, None]
        # On CPUs, indexing takes eight times as long.
        yield probs.index_select(0, target_rows).mul_(scale).sub_(q.index_select(0, q_rows)).clamp_(min=0)


def _make_one_hot(q: torch.Tensor, places: Sequence[tuple[int, int, float]]) -> None:
    """Leave rows with a probability at one target id, and what is missing to 1 at another one."""
    if not places:
        return
    rows = upload([row for row, *_ in places], q.device)
    target_ids = upload([target_id for _, target_id, _ in places], q.device)
    probs = upload([prob for *_, prob in places], q.device)
    q.index_fill_(0, rows, 0)
    q[rows, target_ids] = probs
    q[rows, (target_ids + 1) % q.shape[1]] = 1 - probs
