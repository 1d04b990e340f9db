"""The exact strategies: how drafted tokens become proposals, and which ``q`` goes with them.

A strategy makes an ``Emission`` for each draft of a step, which keeps what the strategy needs for that draft.
``proposals.py`` has the table of all strategies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_tokentiming.align.retokenize import Proxy, retokenize
from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft.distribution import Choices
from vllm_tokentiming.draft.sampling import uniforms
from vllm_tokentiming.transfer.pushforward import PushForward
from vllm_tokentiming.transfer.stages import Stage, StageBuilder
from vllm_tokentiming.transfer.state import DraftState, Emission, ProposalProbs
from vllm_tokentiming.vocab.pair import VocabularyPair


@dataclass(frozen=True)
class TransferTools:
    """The parts that strategies work with, for one pair on one device.

    Attributes:
        pair: The vocabularies.
        transducer: The pair's transducer; one to one for ``tli``.
        pushforward: Carries ``Q`` over to the target's vocabulary.
        stages: Makes stages of verification.
        max_draft_tokens: Most draft tokens drafted for a request in a step.
    """

    pair: VocabularyPair
    transducer: Transducer
    pushforward: PushForward
    stages: StageBuilder
    max_draft_tokens: int


class Strategy(Protocol):
    """A row of the table in ``proposals.py``.

    Attributes:
        draws: Whether sampled requests draw from ``Q`` and get a ``q``; if not, their proposals are one-hot.
        for_target_tokens: Whether ``Q`` is shaped for the target tokens that the transducer emits; see
            ``DraftDistribution``.
    """

    draws: bool
    for_target_tokens: bool

    def start(self, draft: DraftState, probs: ProposalProbs) -> Emission:
        """Return the emission of a draft in a new step.

        Args:
            draft: The draft. It draws if it has ``draw.sampling``.
            probs: The probabilities of the step, which the emission adds to.
        """
        ...


class Reencoding:
    """Encodes the whole drafted text in the target's vocabulary; proposals are one-hot.

    Re-encoding is deferred until the tokens' separate encodings reach ``max_proposals``: jointly they are hardly ever
    longer. So the emission keeps an estimate of the number of target tokens, and whether text was deferred.
    """

    def __init__(self, pair: VocabularyPair, num_target_ids: list[int]) -> None:
        """Start with no text.

        Args:
            pair: The vocabularies.
            num_target_ids: ``[draft size]``, how many target tokens each draft token makes alone.
        """
        self._pair = pair
        self._num_target_ids = num_target_ids
        self._estimated_target_tokens = 0
        self._needs_reencode = False

    def append(self, draft: DraftState, choices: Choices, row: int) -> None:
        """See ``Emission``."""
        draft_id = choices.draft_ids[row]
        self._estimated_target_tokens += self._num_target_ids[draft_id]
        self._needs_reencode = (
            self._estimated_target_tokens < draft.max_proposals and draft_id not in self._pair.special.to_target
        )
        if not self._needs_reencode:
            draft.proxy = retokenize(self._pair, draft.draft_ids)

    def finish(self, draft: DraftState) -> None:
        """See ``Emission``."""
        if self._needs_reencode:
            draft.proxy, self._needs_reencode = retokenize(self._pair, draft.draft_ids), False


class Renaming:
    """Emits the one target token that each draft token of the intersection is."""

    def __init__(self, tools: TransferTools) -> None:
        """Start with no tokens."""
        self._tools = tools

    def append(self, draft: DraftState, choices: Choices, row: int) -> int | None:
        """See ``Emission``."""
        draft_id, start = choices.draft_ids[row], len(draft.proxy.target_ids)
        emitted, _ = self._tools.transducer.emit(b"", draft_id)
        draft.proxy = Proxy(draft.proxy.target_ids + emitted, draft_id in self._tools.pair.special.to_target)
        return start if draft.draw.sampling and start < draft.max_proposals else None

    def finish(self, draft: DraftState) -> None:
        """See ``Emission``."""


class Transduction:
    """Emits the target tokens of each drawn draft token at once, with the push-forward of ``Q`` as ``q``.

    Attributes:
        stages: The draws so far towards the next proposal, for which no target token has been emitted yet.
    """

    def __init__(self, tools: TransferTools, probs: ProposalProbs) -> None:
        """Start with no tokens.

        Args:
            tools: The parts to work with.
            probs: The probabilities of the step, which are added to.
        """
        self._tools = tools
        self._probs = probs
        self.stages: list[Stage] = []

    def append(self, draft: DraftState, choices: Choices, row: int) -> int | None:
        """See ``Emission``."""
        tools, draft_id, source = self._tools, choices.draft_ids[row], choices.sources[row]
        pending, start = draft.draw.pending, len(draft.proxy.target_ids)
        emitted, draft.draw.pending = tools.transducer.emit(pending, draft_id)
        draft.proxy = Proxy(draft.proxy.target_ids + emitted, draft_id in tools.pair.special.to_target)
        if start >= draft.max_proposals:
            return None
        # What a lossy target cannot write leaves a stage behind, and nothing pending.
        if choices.is_stage[row] or self.stages:
            self._add_stage(draft, choices, row, pending, start, bool(emitted))
        for depth in range(1, min(len(emitted), draft.max_proposals - start)):
            before = emitted[:depth]
            self._probs.rows[draft.q_row, start + depth] = (
                tools.pushforward.later_candidate_row(choices.candidates[row], before)
                if pending
                else tools.pushforward.later_row(choices.draft_probs[source], tuple(before))
            )
        return start if emitted and not pending else None

    def finish(self, draft: DraftState) -> None:
        """See ``Emission``. Where drafting ended with bytes pending, a placeholder is proposed, so no stage is lost."""
        if not self.stages:
            return
        position = len(draft.proxy.target_ids)
        target_id = self._tools.stages.any_of(self.stages[-1], draft.draw.pending)
        draft.placeholder_ids = [target_id]
        self._probs.rows[draft.q_row, position, target_id] = 1
        self._probs.stages[draft.q_row, position] = self.stages

    def _add_stage(
        self, draft: DraftState, choices: Choices, row: int, pending: bytes, position: int, commits: bool
    ) -> None:
        """Add the stage of a draw.

        Args:
            draft: The draft.
            choices: The choices of the pass.
            row: The draft's place in them.
            pending: The bytes that were pending before the draw.
            position: The position of the proposal that the stage belongs to.
            commits: Whether the draw emitted a target token.
        """
        if draft.draw.sampling is None:
            raise RuntimeError("a draft that does not draw has no stages")
        tools, q = self._tools, self._probs.rows[draft.q_row, position]
        left = None if commits else draft.draw.pending
        # The numbers after those that the draft is drawn with.
        number = tools.max_draft_tokens + len(draft.draft_ids)
        uniform = uniforms(draft.draw.sampling.seed, draft.position, number)[-1]
        if pending:
            at_once = q if commits else torch.zeros_like(q)
            stage = tools.stages.later_stage(choices.candidates[row], at_once, left, uniform)
        else:
            probs = choices.draft_probs[choices.sources[row]]
            at_once = q if commits else tools.pushforward.first_rows(probs.unsqueeze(0), has_incomplete=True)[0]
            stage = tools.stages.first_stage(probs, at_once, left, uniform)
        self.stages.append(stage)
        if commits:
            self._probs.stages[draft.q_row, position], self.stages = self.stages, []


class Slem:
    """Drafts greedily for all requests, and re-encodes the text."""

    draws = False
    for_target_tokens = False

    def __init__(self, tools: TransferTools) -> None:
        """Read how many target tokens each draft token makes.

        Args:
            tools: The parts to work with.
        """
        self._pair = tools.pair
        self._num_target_ids: list[int] = tools.transducer.count.tolist()

    def start(self, draft: DraftState, probs: ProposalProbs) -> Emission:
        """See ``Strategy``."""
        return Reencoding(self._pair, self._num_target_ids)


class Tli:
    """Drafts in the intersection of both vocabularies, where each draft token is one target token."""

    draws = True
    for_target_tokens = False

    def __init__(self, tools: TransferTools) -> None:
        """Take the parts to work with."""
        self._tools = tools

    def start(self, draft: DraftState, probs: ProposalProbs) -> Emission:
        """See ``Strategy``."""
        return Renaming(self._tools)


class TokenTiming:
    """Draws from ``Q`` and transduces; greedy requests draft likely target tokens, and the text is re-encoded."""

    draws = True
    for_target_tokens = True

    def __init__(self, tools: TransferTools) -> None:
        """Take the parts to work with."""
        self._tools = tools
        self._greedy = Slem(tools)

    def start(self, draft: DraftState, probs: ProposalProbs) -> Emission:
        """See ``Strategy``."""
        return Transduction(self._tools, probs) if draft.draw.sampling else self._greedy.start(draft, probs)
