"""Verification in stages: of target tokens that the draft spells in several pieces.

Where the draft writes the bytes of a character one by one, a proposed target token depends on its own first pieces.
Handed to the verifier with its law *given* those pieces, it would nearly always be rejected: the target has only a
small probability for any one token, and the draft, given the pieces, a large one for this. So the pieces are verified
one after the other. A draw of the draft is a stage: it either commits a target token at once, or goes on waiting, with
some bytes. To each of these outcomes belong the target tokens that the draft spells that way (``Transducer.waits``),
and the target's probability of an outcome is that of its tokens together. The outcome is accepted, or another one is
drawn, as tokens are in rejection sampling; then both sides are conditioned on it, and the next stage follows.

**A stage that was drawn is verified.** The token emitted follows the target's law over all that the draft might have
drawn, not given what it has drawn. So drafting may end while bytes wait, but not without a proposal: any one target
token of the group is then proposed, as one-hot, after the stages that there were.

**In vLLM's terms.** Only the last stage is left to vLLM's rejection sampler, as two rows ``p`` and ``q`` in the place
of the target's law and the proposal's. It accepts with probability ``p / q`` and else draws from ``(p - q)^+``, so
their common scale does not matter. The proof stands in ``docs/theory.md``.

Random numbers come from the request's seed, apart from those that the draft is drawn with and those of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_tokentiming.tensors import add_at
from vllm_tokentiming.transfer.stages import Stage

_TINY = torch.finfo(torch.float32).tiny


def resolve_stages(
    target_probs: torch.Tensor, proposed_id: int, stages: Sequence[Stage]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Verify all stages of a proposal but the last, and say what is left to verify.

    Args:
        target_probs: ``[target size] float32``, the target's law.
        proposed_id: The proposed target token.
        stages: Of its drafting, in order. If the last one did not commit it, it does not depend on what was drawn after
            them, and is verified as one-hot.

    Returns:
        ``p``, which sums to 1, and ``q``, each ``[target size] float32``, for the rejection sampler.
    """
    p = target_probs
    alone = torch.zeros_like(p)
    alone[proposed_id] = 1
    for stage in stages:
        target_ids, groups = stage.groups.target_ids, stage.groups.groups
        # Which outcome a target token belongs to may depend on the law of the draw, though not on what was drawn.
        mass = p[target_ids].masked_fill_(stage.at_once[target_ids] > 0, 0)
        waiting = add_at(p.new_zeros(stage.groups.number), 0, groups, mass)
        if stage.drawn is not None and stage.drawn >= 0:
            share, drawn_with = torch.stack([waiting, stage.waiting])[:, stage.drawn].tolist()
            if share > 0 and stage.uniform * drawn_with < share:
                given = mass.masked_fill_(groups != stage.drawn, 0).div_(share)
                p = torch.zeros_like(p).index_add_(0, target_ids, given)
                continue
        more = (waiting - stage.waiting).clamp_(min=0).div_(waiting.clamp(min=_TINY))
        rest = p.index_add(0, target_ids, mass * (more[groups] - 1))
        q = stage.at_once
        if stage.drawn is not None:
            # What is emitted instead does not depend on what is proposed, so that is verified as one-hot.
            rest, q = rest.sub_(stage.at_once).clamp_(min=0), alone
        total = float(rest.sum())
        if total <= 0:  # By rounding alone.
            return target_probs, alone
        return rest.div_(total), q if q is alone else q / total
    return p, alone


@dataclass(frozen=True)
class StagedProposal:
    """A proposal that is verified in stages.

    Attributes:
        target_id: The proposal.
        target_row: Its row of the target's logits.
        q_row: Its row of ``q``.
        stages: Of its drafting, in order.
    """

    target_id: int
    target_row: int
    q_row: int
    stages: Sequence[Stage]


def verify_stages(
    target_logits: torch.Tensor, q: torch.Tensor, proposals: Sequence[StagedProposal]
) -> tuple[list[int], torch.Tensor]:
    """Verify all stages of proposals but the last, and leave the rejection sampler what is left to verify.

    Args:
        target_logits: ``[*, target size] float32``, as the requests shape them. Not changed.
        q: ``[*, target size] float32``; the rows of the proposals are overwritten.
        proposals: The proposals; at least one.

    Returns:
        Their rows of ``target_logits``, and ``[rows, target size] float32``, the logits that are left there.
    """
    left = []
    for proposal in proposals:
        probs = target_logits[proposal.target_row].softmax(-1, dtype=torch.float32)
        p, q[proposal.q_row] = resolve_stages(probs, proposal.target_id, proposal.stages)
        left.append(p.log())
    return [proposal.target_row for proposal in proposals], torch.stack(left)
