"""The published transfer (arXiv 2510.15545): **not exact**, for comparison only.

It gives a proxy token the probability of the draft token that it is aligned to. The proxy token came out of the whole
drafted text, so this is not the distribution that it was drawn from (``docs/theory.md``).
"""

from __future__ import annotations

import torch

from vllm_tokentiming.align.retokenize import align, retokenize
from vllm_tokentiming.draft.distribution import Choices
from vllm_tokentiming.transfer.pushforward import PushForward
from vllm_tokentiming.transfer.state import DraftState, Emission, ProposalProbs
from vllm_tokentiming.transfer.strategies import Slem, TransferTools


class PaperEmission:
    """Re-encodes the drafted text, and keeps the distribution of each drafted token until the step ends."""

    def __init__(self, tools: TransferTools, probs: ProposalProbs) -> None:
        """Start with no tokens.

        Args:
            tools: The parts to work with.
            probs: The probabilities of the step, which are added to.
        """
        self._tools = tools
        self._probs = probs
        self._distributions: list[torch.Tensor] = []  # ``Q`` of each drafted token, ``[draft size]``.

    def append(self, draft: DraftState, choices: Choices, row: int) -> None:
        """See ``Emission``."""
        self._distributions.append(choices.draft_probs[choices.sources[row]])
        draft.proxy = retokenize(self._tools.pair, draft.draft_ids)

    def finish(self, draft: DraftState) -> None:
        """See ``Emission``."""
        if not draft.draft_ids:
            return
        blocks = align(self._tools.pair, draft.draft_ids, draft.proxy).tolist()
        for draft_start, draft_end, target_start, target_end in blocks:
            for position in range(target_start, min(target_end, draft.max_proposals)):
                aligned = min(draft_start + position - target_start, draft_end - 1)
                self._probs.rows[draft.q_row, position] = paper_row(
                    self._tools.pushforward,
                    self._distributions[aligned],
                    draft.draft_ids[aligned],
                    draft.proxy.target_ids[position],
                )


class PaperTransfer:
    """Draws from ``Q`` and re-encodes the text; greedy requests draft as in ``Slem``."""

    draws = True
    for_target_tokens = False

    def __init__(self, tools: TransferTools) -> None:
        """Take the parts to work with."""
        self._tools = tools
        self._greedy = Slem(tools)

    def start(self, draft: DraftState, probs: ProposalProbs) -> Emission:
        """See ``Strategy``."""
        return PaperEmission(self._tools, probs) if draft.draw.sampling else self._greedy.start(draft, probs)


def paper_row(pushforward: PushForward, probs: torch.Tensor, draft_id: int, target_id: int) -> torch.Tensor:
    """Apply the published transfer to one proxy token.

    The aligned draft token's probability goes to the proxy token, the others' to what they would emit alone.

    Args:
        pushforward: The pair's push-forward.
        probs: ``Q``, ``[draft size]``, that the aligned draft token was drawn from.
        draft_id: The aligned draft token.
        target_id: The proxy token.

    Returns:
        ``[target size] float32``.
    """
    q = pushforward.first_rows(probs.index_fill(0, torch.tensor([draft_id], device=probs.device), 0).unsqueeze(0))[0]
    mass = float(probs[draft_id])
    q *= (1 - mass) / q.sum().clamp(min=1e-30)
    q[target_id] += mass
    return q
