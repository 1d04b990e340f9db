"""One step of drafting for a batch: contexts follow their targets, the draft writes, its text becomes proposals.

**Order of a step.** (1) Every context takes in what its target committed, and keeps the KV entries that still stand.
Requests whose text repeats itself copy what followed (``draft/repeats.py``), if that promises more than the draft, or
if there will be no draft. (2) One pass of the draft reads what each other context has and the cache has not: a few
tokens for a running request, the next chunk of a prompt for a new one, the shortest first, up to the pass's limit.
(3) Requests that have caught up draft token by token, together, until each has as many target tokens as it may propose.
(The last of them may be a piece of a longer target token. Drafting on until no further text could change it was
measured: as many tokens were accepted, for more passes of the draft.)

**What is not read.** Entries that stand, whoever wrote them: accepted draft tokens, and what another request with the
same beginning has read, be it in the same pass (``draft/kv_pool.py``).

**What is lost when something is missing.** Without a row, blocks, or positions left, a request gets no proposals of the
draft's in this step; it loses speed and nothing else.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.util import Finalize

import torch

from vllm_tokentiming.context import Drafted
from vllm_tokentiming.draft.batch import RequestSnapshot
from vllm_tokentiming.draft.counts import Counts
from vllm_tokentiming.draft.distribution import DrawState
from vllm_tokentiming.draft.learned_file import LearnedWeightsFile
from vllm_tokentiming.draft.learned_weights import LearnedWeights, Lesson
from vllm_tokentiming.draft.length import DraftPlan, FixedLength
from vllm_tokentiming.draft.phase_clock import PhaseClock
from vllm_tokentiming.draft.protocol import DraftModel, Span
from vllm_tokentiming.draft.sequences import DraftSequence, DraftSequences
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.transfer.proposals import ProposalBuilder
from vllm_tokentiming.transfer.stages import Stage
from vllm_tokentiming.transfer.state import DraftState
from vllm_tokentiming.vocab.pair import VocabularyPair


@dataclass(frozen=True)
class Proposals:
    """The proposals of one step.

    Attributes:
        target_ids: Per request, up to ``max_proposals`` target ids.
        q: ``[len(q_request_ids), num_speculative_tokens, target vocabulary] float32``, the distribution that each
            was drawn from; ``None`` if all are to be verified as one-hot.
        q_request_ids: The requests that ``q`` has rows for: all that have proposals.
        stages: By request and position: of the proposals that are verified in stages; without them, their ``q`` does
            not count.
        uniforms: By request: of those whose proposals are verified in blocks, a random number for each proposal.
        lessons: By request and position: the draft's ``Q`` of proposals that may teach, ``[draft size] float32``.
    """

    target_ids: list[list[int]]
    q: torch.Tensor | None = None
    q_request_ids: list[str] = field(default_factory=list)
    stages: dict[tuple[str, int], list[Stage]] = field(default_factory=dict)
    uniforms: dict[str, list[float]] = field(default_factory=dict)
    lessons: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)

    def stages_of(self, request_id: str, number: int) -> dict[int, list[Stage]]:
        """Return the stages of a request's first ``number`` proposals, by position."""
        places = ((position, (request_id, position)) for position in range(number))
        return {position: self.stages[place] for position, place in places if place in self.stages}


class Drafter:
    """Drafts for all requests of one worker.

    Attributes:
        counts: What it has computed.
        clock: Where its time goes: ``context``, ``read`` (the first pass), ``draft`` (the others), ``write`` (what is
            drawn, proposed, and with which probabilities). On an accelerator, passes end in ``write``, which waits.
        costs: What the passes of the last step cost: kind, tokens and seconds, as ``FixedLength.observe`` takes them.
        sequences: What it has of each request.
    """

    def __init__(
        self,
        pair: VocabularyPair,
        model: DraftModel,
        builder: ProposalBuilder,
        length: FixedLength,
        max_draft_tokens: int,
        *,
        copy_repeats: bool = False,
        learned_file: LearnedWeightsFile | None = None,
    ) -> None:
        """Bring the vocabularies and the model together.

        Args:
            pair: The vocabularies.
            model: The draft model.
            builder: Turns its logits into proposals.
            length: Decides how much to draft.
            max_draft_tokens: Most draft tokens written for a request in a step.
            copy_repeats: Whether what followed the same text before may be proposed without a draft.
            learned_file: Where what is learned is kept between starts; ``None`` for nowhere.
        """
        self._length = length
        self._model = model
        self._max_draft_tokens = max_draft_tokens
        self._builder = builder
        self._learned_file = learned_file
        if learned_file is not None:
            # When this drafter is let go, or the process ends in order. ``atexit`` does not run in forked workers.
            Finalize(self, learned_file.keep, exitpriority=0)
        self.costs: list[tuple[str, int, float]] = []
        self.counts = Counts()
        self.clock = PhaseClock()
        copied_below = min(pair.target.token_bytes.size, builder.target_size) if copy_repeats else None
        self.sequences = DraftSequences(
            pair, model, length, self.counts, max_draft_tokens, copied_below=copied_below
        )  # fmt: skip

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their blocks."""
        self.sequences.release(request_ids)

    def release_all(self) -> None:
        """Forget every request and whatever is in the cache, which cannot be relied on after a fault."""
        self.clock.enter("")
        self.sequences.release(list(self.sequences.by_request))
        self._model.pool.forget_prefixes()

    def numbers(self) -> dict[str, float | dict[str, int] | Counter[str]]:
        """Return all counts since the start, under the names of ``metrics.COUNTERS`` and ``metrics.GAUGES``."""
        counts, pool = self.counts, self._model.pool
        kinds = ("encoded", "read", "reread", "reused", "drafted", "kept")
        return {
            "draft_passes": counts.passes,
            "draft_tokens": {kind: getattr(counts, kind) for kind in kinds},
            "proposed_tokens": counts.proposed,
            "staged_tokens": counts.staged,
            "lessons": 0 if self.learned is None else self.learned.num_lessons,
            "copied_tokens": {"proposed": counts.copied, "accepted": counts.copies_accepted},
            "one_hot": self._builder.one_hot,
            "not_drafted": counts.not_drafted,
            "seconds": self.clock.seconds,
            "draft_blocks": pool.num_blocks,
            "draft_blocks_held": pool.num_blocks - pool.num_free_blocks,
        }

    @property
    def learned(self) -> LearnedWeights | None:
        """Return what corrects the draft's distribution; ``None`` if nothing is learned."""
        return self._builder.learned

    def learn(self, target_logits: torch.Tensor, lessons: Sequence[Lesson]) -> None:
        """Learn from positions that the target has verified.

        Args:
            target_logits: ``[*, target size] float32``, as the requests shape them.
            lessons: The positions.
        """
        if self.learned is not None and lessons:
            rows = upload([lesson.target_row for lesson in lessons], target_logits.device)
            draft_probs = torch.stack([lesson.draft_probs for lesson in lessons])
            self.learned.learn(draft_probs, target_logits[rows].softmax(-1))
            if self._learned_file is not None:
                self._learned_file.keep_in_time()

    @torch.inference_mode()
    def propose(self, batch: Sequence[RequestSnapshot]) -> Proposals:
        """Propose target tokens for a batch.

        Args:
            batch: The requests in the target's batch.

        Returns:
            The proposals, in the batch's order.

        Raises:
            IndexError: An id is outside its vocabulary.
        """
        self.clock.enter("context")
        proposals = self._propose(batch)
        self.clock.enter("")
        return proposals

    def _propose(self, batch: Sequence[RequestSnapshot]) -> Proposals:
        began = time.perf_counter()
        self.costs = []
        requests = [self.sequences.find(snapshot) for snapshot in batch]
        # What became of the last drafts is needed for the plan. Other contexts wait until they are used.
        followed = {index for index, request in enumerate(requests) if request.drafted is not None}
        for index in followed:
            self.sequences.commit(requests[index], batch[index])
        could_copy, preferred = self._copies(batch, requests)
        drafts, logits, num_read = self._start(batch, requests, followed, preferred)
        idle = set(could_copy) - {draft.index for draft in drafts} - preferred
        if self._length.wants_plain:
            idle = {index for index in idle if batch[index].reproducible}
        copies = {index: copied for index, copied in could_copy.items() if index in preferred or index in idle}
        target_ids: list[list[int]] = [copies.get(index, []) for index in range(len(batch))]
        for index, copied_ids in copies.items():
            requests[index].open_repeats.num_copied = len(copied_ids)
            self.counts.copied += len(copied_ids)
            self.counts.proposed += len(copied_ids)
        if logits is None:
            return Proposals(target_ids)
        self._builder.start_step(drafts, len(copies))
        self._draft(drafts, requests, logits, began, num_read)
        written = time.perf_counter()
        self._builder.finish_step(drafts, list(copies.values()))
        for draft in drafts:
            request = requests[draft.index]
            request.drafted, request.plan = Drafted(draft.draft_ids, draft.proxy), draft.plan
            target_ids[draft.index] = draft.proposed_ids
            self.counts.proposed += len(target_ids[draft.index])
            if request.repeats is not None:
                request.repeats.drafted = (target_ids[draft.index], len(draft.draft_ids))
        kind, num_tokens, seconds = self.costs[0]
        self.costs[0] = (kind, num_tokens, seconds + time.perf_counter() - written)
        probs = self._builder.probs
        self.counts.staged += len(probs.stages)
        request_ids = [batch[index].request_id for index in (*(draft.index for draft in drafts), *copies)]
        stages = {(request_ids[row], position): found for (row, position), found in probs.stages.items()}
        numbers = {request_ids[row]: found for row, found in probs.uniforms.items()}
        lessons: dict[str, dict[int, torch.Tensor]] = {}
        for (row, position), draft_probs in probs.lessons.items():
            lessons.setdefault(request_ids[row], {})[position] = draft_probs
        return Proposals(target_ids, probs.q, request_ids, stages, numbers, lessons)

    def _copies(
        self, batch: Sequence[RequestSnapshot], requests: Sequence[DraftSequence]
    ) -> tuple[dict[int, list[int]], set[int]]:
        """Find what may be copied.

        Args:
            batch: The requests.
            requests: What there is of them.

        Returns:
            By place in the batch, the target ids whose verification is worth its time, and the places where they
            promise more than the draft.
        """
        copies: dict[int, list[int]] = {}
        preferred: set[int] = set()
        num_drafting = sum(snapshot.max_proposals > 0 for snapshot in batch)
        for index, (request, snapshot) in enumerate(zip(requests, batch, strict=True)):
            repeats = request.repeats
            if repeats is None:
                continue
            self.counts.copies_accepted += repeats.follow(snapshot.target_ids, snapshot.num_target, snapshot.unread)
            copy = repeats.find(snapshot.max_proposals) if snapshot.max_proposals else None
            if copy is None:
                continue
            reproducible = snapshot.reproducible
            number = self._length.worth_verifying(copy.chances, len(batch), reproducible=reproducible)
            if not number:
                continue
            copies[index] = copy.target_ids[:number]
            price = self._length.price_of_draft(
                repeats.expected_passes, num_drafting, len(batch), reproducible=reproducible
            )
            if sum(copy.chances[:number]) >= repeats.expected_of_draft - price:
                preferred.add(index)
        return copies, preferred

    def _start(
        self,
        batch: Sequence[RequestSnapshot],
        requests: Sequence[DraftSequence],
        followed: set[int],
        copying: set[int],
    ) -> tuple[list[DraftState], torch.Tensor | None, int]:
        """Decide who drafts, and read what that needs.

        Args:
            batch: The requests.
            requests: What there is of them.
            followed: Places of those whose contexts have what is committed.
            copying: Places of those that do not draft.

        Returns:
            The drafts, the logits after what each has read, ``[drafts, draft vocabulary]``, if there are any drafts,
            and how many tokens have been read.
        """
        could = self._plans(batch, requests, copying)
        planned = set(self._length.plan(list(could.values()), len(batch)))
        plans = {index: plan for index, plan in could.items() if plan in planned}
        self.counts.not_drafted["length"] += len(could) - len(plans)
        if could and not plans:
            return [], None, 0
        present = set(requests)
        wanted = [index for index, snapshot in enumerate(batch) if index in plans or snapshot.reading]
        for index in wanted:
            if index not in followed:
                self.sequences.commit(requests[index], batch[index])
        with_room = [
            requests[index] for index in wanted if self.sequences.allocate(requests[index], present, index in plans)
        ]
        self.clock.enter("read")
        num_read, read, logits = self.sequences.prefill(with_room)
        self.clock.enter("write")
        places = {requests[index]: index for index in plans}
        ready = [row for row, request in enumerate(read) if request in places and request.is_prefilled]
        self.counts.not_drafted["reading"] += sum(requests[index].row is not None for index in plans) - len(ready)
        if not ready or logits is None:
            return [], None, num_read
        if len(ready) < len(read):
            logits = logits[upload(ready, logits.device)]
        drafts = []
        for row in ready:
            index = places[read[row]]
            snapshot = batch[index]
            allow_incomplete = self._builder.distribution.allows_incomplete(read[row].context.draft_ids)
            draw = self._draw_state(snapshot, allow_incomplete)
            # Its proposals must not tell other requests anything if a salt keeps it apart, or may.
            may_teach = draw.uses_learned and snapshot.cache_salt == ""
            drafts.append(DraftState(index, plans[index], draw, snapshot.num_target, snapshot.greedy, may_teach))
        return drafts, logits, num_read

    def _draw_state(self, snapshot: RequestSnapshot, allow_incomplete: bool) -> DrawState:
        """Return how a request draws in this step.

        With learned weights, its random numbers are those of their version. They are then independent of all that was
        learned, even if an earlier request had the same id and so the same numbers.
        """
        learned, sampling = self.learned, snapshot.sampling
        if learned is None or sampling is None or snapshot.reproducible:
            return DrawState(sampling, allow_incomplete)
        seed = sampling.seed + (learned.version << 64)
        return DrawState(dataclasses.replace(sampling, seed=seed), allow_incomplete, uses_learned=True)

    def _plans(
        self, batch: Sequence[RequestSnapshot], requests: Sequence[DraftSequence], copying: set[int]
    ) -> dict[int, DraftPlan]:
        """Return a plan for each request that could draft and does not copy, by its place in the batch."""
        return {
            index: DraftPlan(
                request.history,
                snapshot.max_proposals,
                num_unread=len(request.context.draft_ids)
                - request.num_cached
                + snapshot.num_target
                - request.context.num_target,
                sampled=snapshot.sampling is not None,
                reproducible=snapshot.reproducible,
            )
            for index, (request, snapshot) in enumerate(zip(requests, batch, strict=True))
            if snapshot.max_proposals and index not in copying
        }

    def _draft(
        self,
        drafts: list[DraftState],
        requests: Sequence[DraftSequence],
        logits: torch.Tensor,
        began: float,
        num_read: int,
    ) -> None:
        """Write draft tokens, all requests together, one each per pass.

        Args:
            drafts: Who writes.
            requests: The batch.
            logits: ``[len(drafts), draft vocabulary]``, after what has been read.
            began: When the step began.
            num_read: Tokens that have been read in it.
        """
        kind, num_tokens = "first", num_read
        for num_drafted in range(1, self._max_draft_tokens + 1):
            self._builder.append_tokens(drafts, logits)
            now = time.perf_counter()
            self.costs.append((kind, num_tokens, now - began))
            drafts = [draft for draft in drafts if not draft.done]
            going = self._length.go_on([draft.plan for draft in drafts])
            if len(going) < len(drafts):
                kept = set(going)
                drafts = [draft for draft in drafts if draft.plan in kept]
            if not drafts or num_drafted == self._max_draft_tokens:
                return
            spans = []
            for draft in drafts:
                request = requests[draft.index]
                spans.append(Span(request.open_row, request.num_cached, draft.draft_ids[-1:]))
                request.num_cached += 1
            self.counts.drafted += len(spans)
            self.clock.enter("draft")
            logits = self._model.forward(spans)
            self.counts.passes += 1
            self.clock.enter("write")
            kind, num_tokens, began = "later", len(drafts), now
