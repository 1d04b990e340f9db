"""Turns draft logits into proposals: the strategies, side by side over one engine.

| strategy | greedy request | sampled request | ``q`` |
|---|---|---|---|
| ``tokentiming`` | drafts likely target tokens, re-encodes | draws from ``Q``, transducer | push-forward of ``Q`` |
| ``slem`` | drafts greedily, re-encodes the text | the same | one-hot |
| ``tli`` | drafts greedily in the intersection | draws from ``Q`` in the intersection | ``Q``, renamed |
| ``tokentiming-paper`` | as ``slem`` | draws from ``Q``, re-encodes the text | **not exact**: as published |

A sampled request whose proposals vLLM may cut by looking at them (structured output) is drafted as a greedy one:
one-hot ``q`` is exact whatever is cut.

**Independence.** Nothing here decides to propose a position by looking at the token that was drawn for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_tokentiming.align.retokenize import Proxy, align, retokenize
from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.config import MAX_DRAFT_IDS
from vllm_tokentiming.draft.length import Chain, FixedLength
from vllm_tokentiming.draft.sampling import DraftSampling, Truncate, draw, law, uniforms
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.transfer.pushforward import Candidates, Transfer
from vllm_tokentiming.transfer.stages import Stage
from vllm_tokentiming.vocab.pair import VocabularyPair

_LATELY = 8  # Draft tokens.
_MOST_LOGITS = 1 << 24  # That are worked on at once: 64 requests with a vocabulary of 262,144.


@dataclass
class Draft:
    """The draft of one request in this step.

    Attributes:
        index: The request's place in the batch.
        chain: How much of it.
        sampling: How to draw; ``None`` to draft greedily, with one-hot ``q``.
        position: Committed target tokens.
        greedy: Whether the target takes its likeliest tokens.
        row: Its row in ``Writer.q``.
        draft_ids: The drafted tokens.
        proxy: What they are in target tokens.
        pieces: Whether pieces of characters may be drafted: not where none have been lately.
    """

    index: int
    chain: Chain
    sampling: DraftSampling | None
    position: int
    greedy: bool = False
    row: int = -1
    pieces: bool = True
    draft_ids: list[int] = field(default_factory=list)
    proxy: Proxy = field(default_factory=lambda: Proxy([]))
    pending: bytes = b""
    candidates: Candidates | None = None  # Of the draw that is on, with bytes pending.
    stages: list[Stage] = field(default_factory=list)  # Of the next proposal's drafting.
    after: list[int] = field(default_factory=list)  # Proposed after ``proxy``, for stages that none followed.
    uniform: list[float] = field(default_factory=list)  # For the draws.
    laws: list[torch.Tensor] = field(default_factory=list)  # `Q` of each drafted token; the published transfer only
    stopped: bool = False
    stale: bool = False  # Whether tokens were drafted that ``proxy`` does not have yet.
    about: int = 0  # Target tokens that the drafted ones make, each alone.

    @property
    def max_proposals(self) -> int:
        """Most target tokens to propose."""
        return self.chain.max_proposals

    @property
    def proposed_ids(self) -> list[int]:
        """The target tokens to propose."""
        return (self.proxy.target_ids + self.after)[: self.max_proposals]

    @property
    def done(self) -> bool:
        """Return whether more drafting could add no proposal, or is not worth it."""
        return self.stopped or self.proxy.ended or len(self.proxy.target_ids) >= self.max_proposals


class Writer:
    """Turns the draft's logits into drafted tokens, proposals, and their probabilities.

    Attributes:
        max_rows: Most requests in a step that ``q`` has room for.
        q: Of the step, ``[drafts, num_proposals, target size] float32``, if any draft draws.
        stages: Of the step, by row and position: of the proposals whose ``q`` counts in the last stage alone.
        one_hot: Drafts of sampled requests without ``q``, since the start, by reason: the ``strategy`` draws none,
            there is not ``memory`` enough, or vLLM may cut the proposals of a request with a ``grammar``.
    """

    def __init__(
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
        log_prior: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Choose a strategy.

        Args:
            pair: The vocabularies.
            transducer: Of the pair; one to one for ``tli``.
            strategy: Its name.
            draft_size: Columns of the draft's logits.
            target_size: Columns of the target's logits.
            num_proposals: Most target tokens to propose for a request.
            max_draft_tokens: Most draft tokens written for a request in a step.
            device: Where the draft's logits are.
            max_q_bytes: Most memory for ``q`` and the copy of it that vLLM verifies; 0 to draft greedily for all, with
                one-hot ``q``.
            length: Decides whether a token is proposed.
            truncate: Cuts off what top-k and top-p leave out (``draft/sampling.py``).
            log_prior: ``[draft size]``, the logarithm of the alignment prior, to some power.

        Raises:
            ValueError: The draft has too many ids.
        """
        if draft_size > MAX_DRAFT_IDS:
            raise ValueError(f"{draft_size} draft ids are not exact as float32, which holds {MAX_DRAFT_IDS}")
        self._pair = pair
        self._length = length
        self._truncate = truncate
        self._log_prior = None if log_prior is None else torch.from_numpy(log_prior[:draft_size]).float().to(device)
        self._transducer = transducer
        self._transfer = Transfer(self._transducer, draft_size, target_size, device)
        self._count: list[int] = self._transducer.count.tolist()
        self._always_transduce = strategy == "tli"
        self._published = strategy == "tokentiming-paper"
        self._draws = strategy != "slem"
        self._pushes = strategy == "tokentiming"
        self._max_draft_tokens = max_draft_tokens
        self._shape = (num_proposals, target_size)
        # Twice: vLLM copies the rows that it verifies.
        self.max_rows = max_q_bytes // (2 * 4 * num_proposals * target_size)
        draftable = torch.zeros(draft_size, dtype=torch.bool)
        known = torch.from_numpy(self._transducer.draftable)[:draft_size]
        draftable[: len(known)] = known
        self._never = (~draftable).nonzero().squeeze(1).to(device)
        self._staged = strategy == "tokentiming" and len(self._transducer.waiting) > 0
        # With nothing pending, what is lost says nothing about what comes next, so drawing it would be of no use.
        lost = torch.from_numpy(self._transducer.lost if strategy == "tokentiming" else np.empty(0, np.int64))
        self._lost = lost[lost < draft_size].to(device)
        self._never_or_waiting = torch.cat([self._never, self._lost, self._transfer.waiting])
        self._wide = [not (data or b"").isascii() for data in pair.draft.token_bytes.pieces]
        self._device = device
        self.q: torch.Tensor | None = None
        self.stages: dict[tuple[int, int], list[Stage]] = {}
        self.one_hot: Counter[str] = Counter()

    def pieces_after(self, draft_ids: Sequence[int]) -> bool:
        """Return whether incomplete characters may be drafted after a context: not where all was ASCII lately.

        In such text they hardly ever are what comes, and every draw would have to be checked for them.
        """
        return any(self._wide[draft_id] for draft_id in draft_ids[-_LATELY:])

    def begin(self, drafts: Sequence[Draft]) -> None:
        """Begin a step.

        Args:
            drafts: The requests that will draft.

        Afterwards ``q`` is ``[len(drafts), num_proposals, target size] float32`` if any draft draws, else ``None``:
        proposals are then one-hot. They also are in a step whose ``q`` would be larger than the user allows.
        """
        self.q, self.stages = None, {}
        fits = len(drafts) <= self.max_rows
        for row, draft in enumerate(drafts):
            draft.row = row
            if not (draft.greedy or (draft.sampling and self._draws and fits)):
                self.one_hot["strategy" if not self._draws else "memory" if draft.sampling else "grammar"] += 1
            if not (self._draws and fits):
                draft.sampling = None
            elif draft.sampling:
                draft.uniform = uniforms(draft.sampling.seed, draft.position, self._max_draft_tokens)
        if any(draft.sampling for draft in drafts):
            self.q = torch.zeros(len(drafts), *self._shape, device=self._device)

    def advance(self, drafts: Sequence[Draft], logits: torch.Tensor) -> None:
        """Write one draft token for each request.

        Args:
            drafts: Requests.
            logits: ``[len(drafts), draft size]``; overwritten.

        Raises:
            FloatingPointError: They are no numbers.
        """
        # A few at a time: the laws, what they are sorted and added up into, would take gigabytes in large vocabularies.
        most = max(1, _MOST_LOGITS // logits.shape[1])
        for first in range(0, len(drafts), most):
            self._advance(drafts[first : first + most], logits[first : first + most])

    def _advance(self, drafts: Sequence[Draft], logits: torch.Tensor) -> None:
        drawing = [] if self.q is None else [row for row, draft in enumerate(drafts) if draft.sampling]
        staging = self._staged and any(drafts[row].pieces for row in drawing)
        self._mask(drafts, drawing, staging, logits)
        staged = None
        if len(drawing) == len(drafts):
            probs, next_ids, staged = self._draw(drafts, staging, logits)
            confidences = probs.amax(-1)
        else:
            confidences, next_ids = self._likeliest(logits)
            if drawing:
                rows = upload(drawing, self._device)
                probs, drawn, staged = self._draw([drafts[row] for row in drawing], staging, logits[rows])
                next_ids[rows], confidences[rows] = drawn, probs.amax(-1)
        # In one go: on an accelerator, every copy to the host waits for it. All as float32, which holds ids exactly.
        written = torch.cat([next_ids, confidences] if staged is None else [next_ids, confidences, staged]).tolist()
        number = len(drafts)
        drawn_ids, confident = written[:number], written[number : 2 * number]
        sources = enumerate(written[2 * number :] or [False] * len(drawing))  # Rows of `probs`, and what is a stage.
        first_rows: list[tuple[int, int, int]] = []  # Rows of `probs` and `q`, and the position.
        # Nothing may be verified with such a `q`.
        if math.isnan(sum(confident)):
            raise FloatingPointError("the draft's logits are not finite")
        for draft, drawn_id, confidence in zip(drafts, drawn_ids, confident, strict=True):
            source, is_stage = next(sources) if draft.sampling else (-1, False)
            # The token is there already, but must not be looked at for this.
            if not self._length.take(draft.chain, confidence):
                draft.stopped = True
                continue
            draft_id = int(drawn_id)
            draft.draft_ids.append(draft_id)
            if self._published and draft.sampling:
                draft.laws.append(probs[source])
                draft.proxy = retokenize(self._pair, draft.draft_ids)
            elif draft.sampling:
                position = self._transduce(draft, draft_id, probs, source, is_stage)
                if position is not None:
                    first_rows.append((source, draft.row, position))
            elif self._always_transduce:
                emitted, draft.pending = self._transducer.emit(draft.pending, draft_id)
                draft.proxy = Proxy(draft.proxy.target_ids + emitted, draft_id in self._pair.special.to_target)
            else:  # Together they hardly make more target tokens than each alone; until those are enough, it can wait.
                draft.about += self._count[draft_id]
                draft.stale = draft.about < draft.max_proposals and draft_id not in self._pair.special.to_target
                if not draft.stale:
                    draft.proxy = retokenize(self._pair, draft.draft_ids)
        if first_rows:
            self._fill_first(first_rows, probs, staged is not None)

    def finish(self, drafts: Sequence[Draft]) -> None:
        """End a step: what was not drawn gets all the mass where others have a ``q``, and no stage is left alone."""
        for draft in drafts:
            if draft.stale:
                draft.proxy, draft.stale = retokenize(self._pair, draft.draft_ids), False
        if self.q is None:
            return
        for draft in drafts:
            if draft.stages:
                position = len(draft.proxy.target_ids)
                target_id = self._transfer.any_of(draft.stages[-1], draft.pending)
                draft.after = [target_id]
                self.q[draft.row, position, target_id] = 1
                self.stages[draft.row, position] = draft.stages
            if draft.laws:
                self._fill_published(draft)
            elif not draft.sampling:
                for position, target_id in enumerate(draft.proxy.target_ids[: draft.max_proposals]):
                    self.q[draft.row, position, target_id] = 1

    def _mask(self, drafts: Sequence[Draft], drawing: list[int], staging: bool, logits: torch.Tensor) -> None:
        """Rule out what must not be drafted, or drawn."""
        if self._staged and not staging and len(drawing) == len(drafts):
            logits.index_fill_(1, self._never_or_waiting, float("-inf"))
            return
        logits.index_fill_(1, self._never, float("-inf"))
        if not drawing:
            return
        fresh = [row for row in drawing if not drafts[row].pending]
        without = [row for row in fresh if self._staged and not drafts[row].pieces]
        for rows, draft_ids in ((fresh, self._lost), (without, self._transfer.waiting)):
            if rows and len(draft_ids):
                logits[upload(rows, self._device)[:, None], draft_ids] = float("-inf")

    def _likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the draft token of each greedy request ``[n]``, and return its probability with it."""
        if not self._pushes:
            confidences, next_ids = logits.softmax(-1, dtype=torch.float32).max(-1)
            return confidences, next_ids
        shaped = logits if self._log_prior is None else logits + self._log_prior
        return self._transfer.likeliest(shaped.softmax(-1, dtype=torch.float32))

    def _draw(
        self, drafts: Sequence[Draft], staging: bool, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Shape the laws and draw from them.

        Returns:
            The laws ``[n, draft size]``, draft ids ``[n]``, and whether what is drawn now is a stage ``[n] bool``;
            ``None`` if nothing is.
        """
        sampling = [draft.sampling for draft in drafts if draft.sampling]
        probs = law(logits, sampling, self._truncate, self._log_prior)
        uniform = [draft.uniform[len(draft.draft_ids)] for draft in drafts]
        pending = [row for row, draft in enumerate(drafts) if draft.pending]
        if not (staging or pending):
            return probs, draw(probs, uniform), None
        staged = upload([bool(draft.pending) for draft in drafts], self._device)
        if with_pieces := [row for row, draft in enumerate(drafts) if staging and draft.pieces and not draft.pending]:
            rows = upload(with_pieces, self._device)
            laws = probs[rows]
            staged[rows] = self._transfer.drop_rare_waits(laws)
            probs[rows] = laws
        if pending:
            laws = probs[upload(pending, self._device)]
            candidates = self._transfer.candidates(laws, [drafts[row].pending for row in pending])
            for row, found in zip(pending, candidates, strict=True):
                drafts[row].candidates = found
                probs[row].zero_()[upload(found.draft_ids, self._device)] = upload(found.masses, self._device)
        return probs, draw(probs, uniform), staged

    def _transduce(self, draft: Draft, draft_id: int, probs: torch.Tensor, source: int, is_stage: bool) -> int | None:
        """Write a drawn token in target tokens.

        Args:
            draft: Whose.
            draft_id: The token.
            probs: ``[n, draft size]``.
            source: The row that is its ``Q``.
            is_stage: Whether the draw was a stage.

        Returns:
            The position whose row of ``q`` is to come from ``Transfer.first_rows``, if any.
        """
        q = self._step_q()
        pending, start = draft.pending, len(draft.proxy.target_ids)
        emitted, draft.pending = self._transducer.emit(pending, draft_id)
        draft.proxy = Proxy(draft.proxy.target_ids + emitted, draft_id in self._pair.special.to_target)
        draft.pieces = draft.pieces or bool(self._wide[draft_id])
        if start >= draft.max_proposals:
            return None
        if is_stage or draft.stages:  # What a lossy target cannot write leaves a stage behind, and nothing pending.
            self._add_stage(draft, probs[source], pending, start, bool(emitted))
        for depth in range(1, min(len(emitted), draft.max_proposals - start)):
            before = emitted[:depth]
            q[draft.row, start + depth] = (
                self._transfer.later_candidate_row(draft.candidates, before)
                if pending and draft.candidates
                else self._transfer.later_row(probs[source], tuple(before))
            )
        return start if emitted and not pending else None

    def _fill_first(self, first_rows: Sequence[tuple[int, int, int]], probs: torch.Tensor, waits: bool) -> None:
        """Fill rows of ``q``: each from a row of ``probs``, of a request's row, at a position."""
        q = self._step_q()
        if len(first_rows) == 1:  # Where nothing is to be copied, that is most of the time it takes.
            ((source, row, position),) = first_rows
            self._transfer.first_rows(probs[source].unsqueeze(0), waits, out=q[row, position].unsqueeze(0))
        else:
            sources, rows, positions = upload(first_rows, self._device).unbind(1)
            laws = probs if len(first_rows) == len(probs) else probs[sources]
            q[rows, positions] = self._transfer.first_rows(laws, waits)

    def _add_stage(self, draft: Draft, probs: torch.Tensor, pending: bytes, position: int, commits: bool) -> None:
        if draft.sampling is None:
            raise RuntimeError("a draft that does not draw has no stages")
        row = self._step_q()[draft.row, position]
        left = None if commits else draft.pending
        # Those after the numbers that the draft is drawn with.
        number = self._max_draft_tokens + len(draft.draft_ids)
        uniform = uniforms(draft.sampling.seed, draft.position, number)[-1]
        if pending:
            if draft.candidates is None:
                raise RuntimeError("bytes are pending, and their candidates are not known")
            at_once = row if commits else torch.zeros_like(row)
            draft.stages.append(self._transfer.later_stage(draft.candidates, at_once, left, uniform))
        else:
            at_once = row if commits else self._transfer.first_rows(probs.unsqueeze(0), waits=True)[0]
            draft.stages.append(self._transfer.first_stage(probs, at_once, left, uniform))
        if commits:
            self.stages[draft.row, position], draft.stages = draft.stages, []

    def _step_q(self) -> torch.Tensor:
        """``q``, in a step in which a draft draws."""
        if self.q is None:
            raise RuntimeError("no draft of this step draws")
        return self.q

    def _fill_published(self, draft: Draft) -> None:
        q = self._step_q()
        for draft_start, draft_end, target_start, target_end in align(
            self._pair, draft.draft_ids, draft.proxy
        ).tolist():
            for position in range(target_start, min(target_end, draft.max_proposals)):
                aligned = min(draft_start + position - target_start, draft_end - 1)
                q[draft.row, position] = self._transfer.paper_row(
                    draft.laws[aligned], draft.draft_ids[aligned], draft.proxy.target_ids[position]
                )
