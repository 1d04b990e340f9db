"""The state of one draft in one step, and what the verifier gets beside the proposals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from vllm_tokentiming.align.retokenize import Proxy
from vllm_tokentiming.draft.distribution import Choices, DrawState
from vllm_tokentiming.draft.length import DraftPlan
from vllm_tokentiming.transfer.stages import Stage


@dataclass
class ProposalProbs:
    """The probabilities of a step's proposals.

    Attributes:
        q: ``[drafts, num_proposals, target size] float32`` if any draft draws; ``None`` if all proposals are one-hot.
        stages: By row of ``q`` and position, the stages of each proposal whose ``q`` counts in the last stage alone.
        uniforms: By row of ``q``, the random numbers that its proposals are verified with as blocks; none for proposals
            that are verified one by one.
        lessons: By row of ``q`` and position, the draft's ``Q`` of proposals that may teach, ``[draft size] float32``.
    """

    q: torch.Tensor | None = None
    stages: dict[tuple[int, int], list[Stage]] = field(default_factory=dict)
    uniforms: dict[int, list[float]] = field(default_factory=dict)
    lessons: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> torch.Tensor:
        """Return ``q``, in a step in which a draft draws."""
        if self.q is None:
            raise RuntimeError("no draft of this step draws")
        return self.q


class Emission(Protocol):
    """Turns the tokens of one draft into target tokens. It keeps what its strategy needs for that."""

    def append(self, draft: DraftState, choices: Choices, row: int) -> int | None:
        """Bring ``draft.proxy`` up to date with the newest token.

        Args:
            draft: The draft, whose newest token is in ``draft_ids`` already.
            choices: The choices of the pass.
            row: The draft's place in them.

        Returns:
            The position whose row of ``q`` is the push-forward of the draft's ``Q``, if any. The builder fills those
            rows, for all drafts together.
        """
        ...

    def finish(self, draft: DraftState) -> None:
        """Do what could wait until the end of the step."""
        ...


@dataclass(slots=True)
class DraftState:
    """The draft of one request in one step.

    Attributes:
        index: The request's place in the batch.
        plan: How much to draft, and how the draft has done.
        draw: The part of the state that the draft's distribution depends on.
        position: Number of committed target tokens.
        greedy: Whether the target takes its likeliest tokens.
        may_teach: Whether the draft may learn from what the target makes of its proposals.
        q_row: The draft's row in ``ProposalProbs.q``.
        draft_ids: The drafted tokens.
        proxy: The drafted tokens as target tokens.
        placeholder_ids: Proposed after ``proxy`` where drafting ended with stages and no target token.
        stopped: Whether the next token was not worth proposing.
        emission: Turns drafted tokens into target tokens; the strategy makes it when the step starts.
    """

    index: int
    plan: DraftPlan
    draw: DrawState
    position: int
    greedy: bool = False
    may_teach: bool = False
    q_row: int = -1
    draft_ids: list[int] = field(default_factory=list)
    proxy: Proxy = field(default_factory=lambda: Proxy([]))
    placeholder_ids: list[int] = field(default_factory=list)
    stopped: bool = False
    emission: Emission = field(init=False)

    @property
    def max_proposals(self) -> int:
        """Most target tokens to propose."""
        return self.plan.max_proposals

    @property
    def proposed_ids(self) -> list[int]:
        """The target tokens to propose."""
        return (self.proxy.target_ids + self.placeholder_ids)[: self.max_proposals]

    @property
    def done(self) -> bool:
        """Return whether more drafting could add no proposal, or is not worth it."""
        return self.stopped or self.proxy.ended or len(self.proxy.target_ids) >= self.max_proposals
