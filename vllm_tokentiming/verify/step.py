"""The proposals of one step: what is decided about them here, and what is left to vLLM's rejection sampler.

Proposals that are drafted in one draw are verified in blocks (``block.py``), or left to vLLM one by one if the user
wants that. A proposal that is drafted in several draws is verified in stages (``stages.py``), alone: blocks end before
it and begin after it. The rejection sampler goes through all of them in order, so a block counts only if what is before
it is accepted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vllm_tokentiming.draft.learned_weights import Lesson
from vllm_tokentiming.transfer.stages import Stage
from vllm_tokentiming.verify.block import Block, verify_blocks
from vllm_tokentiming.verify.stages import StagedProposal, verify_stages


@dataclass(frozen=True)
class ToVerify:
    """The proposals of one request.

    Attributes:
        target_ids: The proposals.
        target_row: The row of the target's logits for the first of them; those of the others follow.
        q_row: The same for ``q``.
        stages: By position, of proposals that have any.
        uniforms: A random number in [0, 1) for each proposal, or none to leave all but stages to the rejection sampler.
        lessons: By position, the draft's ``Q`` of proposals that may teach, ``[draft size] float32``.
    """

    target_ids: Sequence[int]
    target_row: int
    q_row: int
    stages: Mapping[int, Sequence[Stage]]
    uniforms: Sequence[float] = ()
    lessons: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks: what stands between proposals with stages."""
        if not self.uniforms:
            return
        ends = sorted({*self.stages, len(self.target_ids)})
        for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
            if start < end:
                yield Block(
                    self.target_ids[start:end],
                    self.target_row + start,
                    self.q_row + start,
                    self.uniforms[start:end],
                )

    def staged(self) -> Iterator[StagedProposal]:
        """Yield the proposals with stages."""
        for position, stages in self.stages.items():
            yield StagedProposal(self.target_ids[position], self.target_row + position, self.q_row + position, stages)

    def taught(self, first_block: Block | None) -> Iterator[Lesson]:
        """Yield the lessons at positions that follow accepted proposals only.

        Args:
            first_block: The first of ``blocks``, verified; ``None`` if there is none.
        """
        num_accepted = 0
        if first_block is not None and first_block.target_row == self.target_row:
            num_accepted = first_block.num_accepted()
        for position, draft_probs in self.lessons.items():
            if position <= num_accepted and position < len(self.target_ids):
                yield Lesson(self.target_row + position, draft_probs)


class LeftToVerify(NamedTuple):
    """The part of a step that is left to the rejection sampler, and to learning.

    Attributes:
        rows: ``[rows] int64``, of the target's logits.
        logits: ``[rows, target size] float32``, what has to stand there for the rejection sampler. (Copies of all rows
            would take gigabytes for large batches and vocabularies.)
        lessons: What can be learned.
    """

    rows: torch.Tensor
    logits: torch.Tensor
    lessons: list[Lesson]

    @contextlib.contextmanager
    def in_place(self, target_logits: torch.Tensor) -> Iterator[None]:
        """Have it stand in the target's logits for a while.

        Afterwards they are the target's again: vLLM may tell clients of log-probabilities, and lessons are of them.
        """
        before = target_logits[self.rows]
        target_logits[self.rows] = self.logits
        try:
            yield
        finally:
            target_logits[self.rows] = before


def left_to_verify(target_logits: torch.Tensor, q: torch.Tensor, requests: Sequence[ToVerify]) -> LeftToVerify:
    """Decide about proposals, and leave the rejection sampler what is left.

    Args:
        target_logits: ``[*, target size] float32``, as the requests shape them. Not changed.
        q: ``[*, target size] float32``; rows of proposals that were decided about are overwritten.
        requests: The proposals.

    Returns:
        What is left. Its lessons are for the logits as they are given here.
    """
    staged = [proposal for request in requests for proposal in request.staged()]
    blocks_of = [list(request.blocks()) for request in requests]
    blocks = [block for of_request in blocks_of for block in of_request]
    found = [verify_stages(target_logits, q, staged)] if staged else []
    found += [verify_blocks(target_logits, q, blocks)] if blocks else []
    rows = [row for rows, _ in found for row in rows]
    logits = torch.cat([logits for _, logits in found]) if found else target_logits[:0]
    lessons = [
        lesson
        for request, of_request in zip(requests, blocks_of, strict=True)
        for lesson in request.taught(next(iter(of_request), None))
    ]
    return LeftToVerify(torch.tensor(rows, dtype=torch.int64).to(target_logits.device), logits, lessons)
