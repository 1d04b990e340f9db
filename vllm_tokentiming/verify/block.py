"""Block verification: consecutive proposals of a request are accepted or refused together.

Sun et al., "Block Verification Accelerates Speculative Decoding" (ICLR 2025, arXiv 2403.10444), algorithm 2. Verified
one by one, a proposal that the target likes less than the draft ends the step, even if the target likes what follows
more. Verified together, the whole path counts. With ``M_i`` the target's distribution at position ``i``, ``q_i`` the
one that ``x_i`` was drawn from, and ``u_i`` uniform:

    p_0 = 1,  p_i = min(p_(i-1) M_i(x_i) / q_i(x_i), 1)
    Z_i = sum over t of (p_i M_(i+1)(t) - q_(i+1)(t))^+
    h_i = Z_i / (Z_i + 1 - p_i) for i < N,  h_N = p_N

The largest ``i`` with ``u_i < h_i`` is how many are accepted. What follows is drawn from ``(p_i M_(i+1) - q_(i+1))^+``,
or from ``M_(N+1)`` if all are. No draft accepts more on average without more than one path, and none accepts less than
one by one. The proof for distributions that depend on hidden draft tokens stands in ``docs/theory.md``.

**The random numbers belong to one step.** All ``u_i`` are looked at, also those of refused positions, so they may not
be used again when the next step verifies the same positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from vllm_tokentiming.tensors import upload

_MAX_LOGITS = 1 << 24  # Worked on at once, as in ``transfer/proposals.py``.


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
    target_probs = _start(target_logits, q, blocks)
    _add_residual_masses(target_logits, q, blocks)
    accepted: list[tuple[int, int, float]] = []
    refused: list[tuple[int, int, int, float]] = []
    first = 0
    for block in blocks:
        number = block.num_accepted()
        probs = target_probs[first : first + len(block.target_ids)]
        accepted += zip(block.q_rows[:number], block.target_ids[:number], probs[:number], strict=True)
        if number < len(block.target_ids):
            rows = block.target_rows[number], block.q_rows[number]
            refused.append((*rows, block.target_ids[number], block.prefix_ratios[number]))
        first += len(block.target_ids)
    left = _residuals(target_logits, q, refused)
    _make_one_hot(q, [(q_row, target_id, 1.0) for _, q_row, target_id, _ in refused])
    _make_one_hot(q, [(q_row, target_id, prob / 2) for q_row, target_id, prob in accepted])
    return [row for row, *_ in refused], left


def _start(target_logits: torch.Tensor, q: torch.Tensor, blocks: Sequence[Block]) -> list[float]:
    """Start all blocks, and return the target's probabilities of all proposals."""
    device = target_logits.device
    target_rows = upload([row for block in blocks for row in block.target_rows], device)
    q_rows = upload([row for block in blocks for row in block.q_rows], device)
    target_ids = upload([target_id for block in blocks for target_id in block.target_ids], device)
    normalizers = torch.cat([target_logits[rows].logsumexp(-1) for rows in _chunks(target_rows, target_logits)])
    target_probs = (target_logits[target_rows, target_ids] - normalizers).exp()
    target_list, q_list = torch.stack([target_probs, q[q_rows, target_ids]]).tolist()
    # What the draft could not have drawn is not accepted.
    ratios = [p / q if q > 0 and p > 0 else 0.0 for p, q in zip(target_list, q_list, strict=True)]
    first = 0
    for block in blocks:
        block.residual_masses = dict.fromkeys(block.start(ratios[first : first + len(block.target_ids)]), 0.0)
        first += len(block.target_ids)
    found: list[float] = target_list
    return found


def _add_residual_masses(target_logits: torch.Tensor, q: torch.Tensor, blocks: Sequence[Block]) -> None:
    places = [(block, i) for block in blocks for i in block.residual_masses]
    rows = [(block.target_rows[i], block.q_rows[i], block.prefix_ratios[i]) for block, i in places]
    if not rows:
        return
    masses = torch.cat([left.sum(-1) for left in _left(target_logits, q, rows)]).tolist()
    for (block, i), mass in zip(places, masses, strict=True):
        block.residual_masses[i] = mass


def _residuals(
    target_logits: torch.Tensor, q: torch.Tensor, refused: Sequence[tuple[int, int, int, float]]
) -> torch.Tensor:
    """Return the logits of what is drawn in the place of refused proposals.

    Args:
        target_logits: See ``verify_blocks``.
        q: See there.
        refused: For each, the rows of the target's logits and of ``q``, the proposal, and the prefix ratio before it.
    """
    if not refused:
        return target_logits[:0]
    device = target_logits.device
    rows = [(target_row, q_row, ratio) for target_row, q_row, _, ratio in refused]
    left = torch.cat(list(_left(target_logits, q, rows)))
    # There is none by the definition, but for rounding.
    left[torch.arange(len(refused), device=device), upload([target_id for *_, target_id, _ in refused], device)] = 0
    logits = left.log_()
    nothing = logits.isneginf().all(-1, keepdim=True)  # By rounding alone.
    return torch.where(nothing, target_logits[upload([row for row, *_ in refused], device)], logits)


def _left(
    target_logits: torch.Tensor, q: torch.Tensor, rows: Sequence[tuple[int, int, float]]
) -> Iterator[torch.Tensor]:
    """Yield ``(p M - q)^+`` for rows of ``M``, of ``q``, and ``p``."""
    device = target_logits.device
    indices = upload([(target_row, q_row) for target_row, q_row, _ in rows], device)
    ratios = upload([ratio for *_, ratio in rows], device)
    for part in _chunks(torch.arange(len(rows), device=device), target_logits):
        target_rows, q_rows = indices[part].unbind(1)
        probs = target_logits[target_rows].softmax(-1)
        yield probs.mul_(ratios[part, None]).sub_(q[q_rows]).clamp_(min=0)


def _make_one_hot(q: torch.Tensor, places: Sequence[tuple[int, int, float]]) -> None:
    """Leave rows with a probability at one target id, and what is missing to 1 at another one."""
    if not places:
        return
    rows = upload([row for row, *_ in places], q.device)
    target_ids = upload([target_id for _, target_id, _ in places], q.device)
    probs = upload([prob for *_, prob in places], q.device)
    q[rows] = 0
    q[rows, target_ids] = probs
    q[rows, (target_ids + 1) % q.shape[1]] = 1 - probs


def _chunks(rows: torch.Tensor, logits: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(rows, max(1, _MAX_LOGITS // logits.shape[1])))
