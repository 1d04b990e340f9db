"""Builds the proposals of a step, for all requests together: the strategies, side by side over one engine.

| strategy | class | greedy request | sampled request | ``q`` |
|---|---|---|---|---|
| ``tokentiming`` | ``TokenTiming`` | drafts likely target tokens, re-encodes | draws from ``Q``, transduces | pushed |
| ``slem`` | ``Slem`` | drafts greedily, re-encodes the text | the same | one-hot |
| ``tli`` | ``Tli`` | drafts greedily in the intersection | draws from ``Q`` in the intersection | ``Q``, renamed |
| ``tokentiming-paper`` | ``PaperTransfer`` | as ``slem`` | draws from ``Q``, re-encodes the text | **not exact** |

``draft/distribution.py`` chooses the draft tokens, and the strategy's class says what becomes of them. A sampled
request whose proposals vLLM may cut by looking at them (structured output) is drafted as a greedy one: one-hot ``q`` is
exact whatever is cut.

**Independence.** Nothing here decides to propose a position by looking at the token that was drawn for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.config import MAX_DRAFT_IDS
from vllm_tokentiming.draft.distribution import Choices, DraftDistribution
from vllm_tokentiming.draft.learned_weights import LearnedWeights
from vllm_tokentiming.draft.length import FixedLength
from vllm_tokentiming.draft.sampling import uniforms
from vllm_tokentiming.draft.shaping import Truncate
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.transfer.paper import PaperTransfer
from vllm_tokentiming.transfer.pushforward import PushForward
from vllm_tokentiming.transfer.stages import StageBuilder
from vllm_tokentiming.transfer.state import DraftState, ProposalProbs
from vllm_tokentiming.transfer.strategies import Slem, Strategy, Tli, TokenTiming, TransferTools
from vllm_tokentiming.vocab.pair import VocabularyPair

_STRATEGIES: dict[str, Callable[[TransferTools], Strategy]] = {
    "tokentiming": TokenTiming,
    "slem": Slem,
    "tli": Tli,
    "tokentiming-paper": PaperTransfer,
}
_MAX_LOGITS = 1 << 24  # Worked on at once: 64 requests with a vocabulary of 262,144.


class ProposalBuilder:
    """Turns the draft's logits into proposals and their probabilities, for a batch of drafts.

    Attributes:
        distribution: Chooses the draft tokens.
        learned: What corrects their distribution; ``None`` if nothing is learned.
        target_size: Columns of the target's logits.
        max_rows: Most requests in a step that ``q`` has room for.
        probs: The probabilities of the step's proposals.
        one_hot: Drafts of sampled requests without ``q``, since the start, by reason: the ``strategy`` draws none,
            there is not ``memory`` enough, or vLLM may cut the proposals of a request with a ``grammar``.
    """

    def __init__(  # noqa: PLR0913 (it puts together all that a strategy needs)
        self,
        pair: VocabularyPair,
        transducer: Transducer,
        strategy: str,
        *,
        draft_size: int,
        target_size: int,
        num_proposals: int,
        max_draft_tokens: int,
        device: torch.device,
        max_q_bytes: int,
        length: FixedLength,
        truncate: Truncate,
        verify_blocks: bool = True,
        learns: bool = False,
    ) -> None:
        """Choose a strategy.

        Args:
            pair: The vocabularies.
            transducer: The pair's transducer; one to one for ``tli``.
            strategy: The strategy's name.
            draft_size: Columns of the draft's logits.
            target_size: Columns of the target's logits.
            num_proposals: Most target tokens to propose for a request.
            max_draft_tokens: Most draft tokens drafted for a request in a step.
            device: Where the draft's logits are.
            max_q_bytes: Most memory for ``q`` and the copy of it that vLLM verifies; 0 to draft greedily for all, with
                one-hot ``q``.
            length: Decides whether a token is proposed.
            truncate: Cuts off what top-k and top-p leave out (``draft/shaping.py``).
            verify_blocks: Whether drawn proposals are verified in blocks, or one by one.
            learns: Whether the draft's distribution learns from verified positions (``draft/learned_weights.py``).

        Raises:
            ValueError: The draft has too many ids.
        """
        if draft_size > MAX_DRAFT_IDS:
            raise ValueError(f"{draft_size} draft ids are not exact as float32, which holds {MAX_DRAFT_IDS}")
        self._length = length
        self._pushforward = PushForward(transducer, draft_size, target_size, device)
        stages = StageBuilder(transducer, draft_size, device)
        self._strategy = _STRATEGIES[strategy](
            TransferTools(pair, transducer, self._pushforward, stages, max_draft_tokens)
        )
        self.learned = LearnedWeights(transducer, draft_size, device) if learns else None
        self.distribution = DraftDistribution(
            pair,
            transducer,
            draft_size=draft_size,
            device=device,
            truncate=truncate,
            for_target_tokens=self._strategy.for_target_tokens,
            learned=self.learned,
        )
        self._max_draft_tokens = max_draft_tokens
        self._verify_blocks = verify_blocks
        self.target_size = target_size
        self._shape = (num_proposals, target_size)
        # Twice: vLLM copies the rows that it verifies.
        self.max_rows = max_q_bytes // (2 * 4 * num_proposals * target_size)
        self._device = device
        self.probs = ProposalProbs()
        self._next_teacher = 0
        self.one_hot: Counter[str] = Counter()

    def start_step(self, drafts: Sequence[DraftState], num_copied: int = 0) -> None:
        """Start a step.

        Args:
            drafts: The requests that will draft.
            num_copied: Requests whose proposals are copied; their rows of ``q`` follow.

        Afterwards ``probs.q`` is ``[len(drafts) + num_copied, num_proposals, target size] float32`` if any draft draws,
        else ``None``: proposals are then one-hot. They also are in a step whose ``q`` would be larger than the user
        allows.
        """
        # The old ``q`` is let go before there is a new one.
        self.probs = ProposalProbs()
        draws = self._strategy.draws
        num_rows = len(drafts) + num_copied
        fits = num_rows <= self.max_rows
        for row, draft in enumerate(drafts):
            sampling, draft.q_row = draft.draw.sampling, row
            if not (draft.greedy or (sampling and draws and fits)):
                self.one_hot["strategy" if not draws else "memory" if sampling else "grammar"] += 1
            if not (draws and fits):
                draft.draw.sampling = None
            elif sampling:
                draft.draw.uniforms = uniforms(sampling.seed, draft.position, self._max_draft_tokens)
                if self._verify_blocks:
                    self.probs.uniforms[row] = uniforms(sampling.seed, draft.position, self._shape[0], b" blocks")
            draft.emission = self._strategy.start(draft, self.probs)
        if any(draft.draw.sampling for draft in drafts):
            self.probs.q = torch.zeros(num_rows, *self._shape, device=self._device)

    def append_tokens(self, drafts: Sequence[DraftState], logits: torch.Tensor) -> None:
        """Draft one more token for each request.

        Args:
            drafts: The requests.
            logits: ``[len(drafts), draft size]``; overwritten.

        Raises:
            FloatingPointError: The logits are no numbers.
        """
        # A few at a time: the distributions, and what they are sorted and added up into, would take gigabytes in large
        # vocabularies.
        most = max(1, _MAX_LOGITS // logits.shape[1])
        for first in range(0, len(drafts), most):
            self._append_tokens(drafts[first : first + most], logits[first : first + most])

    def _append_tokens(self, drafts: Sequence[DraftState], logits: torch.Tensor) -> None:
        choices = self.distribution.choose(logits, [draft.draw for draft in drafts])
        first_rows: list[tuple[int, int, int]] = []  # Rows of the draft's probabilities and of `q`, and the position.
        for row, draft in enumerate(drafts):
            # The token is there already, but must not be looked at for this.
            if not self._length.take(draft.plan, choices.confidences[row]):
                draft.stopped = True
                continue
            draft.draft_ids.append(choices.draft_ids[row])
            position = draft.emission.append(draft, choices, row)
            if position is not None:
                first_rows.append((choices.sources[row], draft.q_row, position))
        if first_rows:
            self._fill_first(first_rows, choices)
            self._keep_lessons(first_rows, choices, {draft.q_row for draft in drafts if draft.may_teach})

    def finish_step(self, drafts: Sequence[DraftState], copied: Sequence[list[int]] = ()) -> None:
        """End a step: finish the emissions, and give one-hot proposals a row where others have a ``q``.

        Args:
            drafts: The requests that drafted.
            copied: The target ids that are copied for others.
        """
        for draft in drafts:
            draft.emission.finish(draft)
        if self.probs.q is None:
            return
        one_hot = [
            (draft.q_row, draft.proxy.target_ids[: draft.max_proposals]) for draft in drafts if not draft.draw.sampling
        ]
        one_hot += enumerate(copied, len(drafts))
        for row, target_ids in one_hot:
            for position, target_id in enumerate(target_ids):
                self.probs.q[row, position, target_id] = 1

    def _fill_first(self, first_rows: Sequence[tuple[int, int, int]], choices: Choices) -> None:
        """Fill rows of ``q``: each from a row of the draft's probabilities, of a draft's row, at a position."""
        q, probs = self.probs.rows, choices.draft_probs
        if len(first_rows) == 1:  # Where nothing is to be copied, that is most of the time it takes.
            ((source, row, position),) = first_rows
            self._pushforward.first_rows(
                probs[source].unsqueeze(0), choices.has_incomplete, out=q[row, position].unsqueeze(0)
            )
        else:
            sources, rows, positions = upload(first_rows, self._device).unbind(1)
            used = probs if len(first_rows) == len(probs) else probs[sources]
            q[rows, positions] = self._pushforward.first_rows(used, choices.has_incomplete)

    def _keep_lessons(
        self, first_rows: Sequence[tuple[int, int, int]], choices: Choices, teachers: Collection[int]
    ) -> None:
        """Keep the draft's distributions at some positions, to learn from once they are verified.

        Requests take turns, whatever was drawn for them. A position that is verified in stages teaches nothing: there
        the target's distribution is compared with more than one draw of the draft.

        Args:
            first_rows: See ``_fill_first``.
            choices: The choices of the pass.
            teachers: The rows of ``q`` of the drafts that may teach.
        """
        if self.learned is None:
            return
        room = self.learned.most_lessons - len(self.probs.lessons)
        places = [place for place in first_rows if place[1] in teachers and place[1:] not in self.probs.stages]
        if room <= 0 or not places:
            return
        turn = self._next_teacher % len(places)
        chosen = (places[turn:] + places[:turn])[:room]
        self._next_teacher += len(chosen)
        kept = choices.draft_probs[upload([source for source, *_ in chosen], self._device)]
        self.probs.lessons.update(zip((place[1:] for place in chosen), kept, strict=True))
