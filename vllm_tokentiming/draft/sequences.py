"""The draft's sequences: the context of each request, and which of its tokens have entries in the KV cache."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_tokentiming.context import DraftContext, Drafted
from vllm_tokentiming.draft.batch import RequestSnapshot
from vllm_tokentiming.draft.counts import Counts
from vllm_tokentiming.draft.history import AcceptanceHistory
from vllm_tokentiming.draft.length import DraftPlan, FixedLength
from vllm_tokentiming.draft.protocol import DraftModel, Span
from vllm_tokentiming.draft.repeats import Outcomes, Repeats
from vllm_tokentiming.vocab.pair import VocabularyPair


@dataclass(eq=False)
class DraftSequence:
    """One request, as the draft has it."""

    context: DraftContext
    scope: Hashable  # Of what may be shared.
    row: int | None = None
    num_cached: int = 0  # Leading draft ids whose KV entries are in the row.
    drafted: Drafted | None = None  # What was drafted in the last step.
    plan: DraftPlan | None = None  # How much of it.
    history: AcceptanceHistory = field(default_factory=AcceptanceHistory)
    repeats: Repeats | None = None  # What may be copied, if anything may.

    @property
    def num_known(self) -> int:
        """Return how many committed target tokens have been taken in."""
        return max(self.context.num_target, self.repeats.num_target if self.repeats else 0)

    @property
    def is_prefilled(self) -> bool:
        """Return whether all of its context has been read."""
        return self.num_cached == len(self.context.draft_ids)

    @property
    def open_row(self) -> int:
        """Its row, which it has while it is read or drafted for."""
        if self.row is None:
            raise RuntimeError("a request without a row in the draft's KV cache can be neither read nor drafted for")
        return self.row

    @property
    def open_repeats(self) -> Repeats:
        """Its repeated text, of which something is copied."""
        if self.repeats is None:
            raise RuntimeError("nothing may be copied for this request")
        return self.repeats


class DraftSequences:
    """All sequences of one worker.

    Attributes:
        by_request: Each sequence, by its request's id.
    """

    def __init__(
        self,
        pair: VocabularyPair,
        model: DraftModel,
        length: FixedLength,
        counts: Counts,
        max_draft_tokens: int,
        *,
        copied_below: int | None = None,
    ) -> None:
        """Begin without any.

        Args:
            pair: The vocabularies.
            model: The draft model, whose pool holds the entries.
            length: Told what became of each draft.
            counts: Added to.
            max_draft_tokens: Most draft tokens written for a request in a step, for which there has to be room.
            copied_below: Target ids of repeated text are copied if they are below it; ``None`` to copy nothing.
        """
        self._pair = pair
        self._model = model
        self._length = length
        self._counts = counts
        self._max_draft_tokens = max_draft_tokens
        self._copied_below = copied_below
        self._outcomes = {sampled: Outcomes.expected() for sampled in (False, True)}
        self.by_request: dict[str, DraftSequence] = {}

    def find(self, snapshot: RequestSnapshot) -> DraftSequence:
        """Find the sequence of a request, or begin one.

        Args:
            snapshot: The request. Where fewer target tokens are committed than before, its id was given to another one.
        """
        request = self.by_request.get(snapshot.request_id)
        if request is None or request.num_known > snapshot.num_target:
            self.release([snapshot.request_id])
            request = self.by_request[snapshot.request_id] = DraftSequence(
                DraftContext(self._pair), object() if snapshot.cache_salt is None else snapshot.cache_salt
            )
            if self._copied_below is not None:
                others = None if snapshot.reproducible else self._outcomes[not snapshot.greedy]
                request.repeats = Repeats(self._copied_below, others)
        return request

    def commit(self, request: DraftSequence, snapshot: RequestSnapshot) -> None:
        """Take in what the target committed since the last time, and keep the entries that still stand.

        Args:
            request: The sequence.
            snapshot: Its request.
        """
        context = request.context
        num_before = len(context.draft_ids)
        target_ids = snapshot.target_ids[context.num_target : snapshot.num_target].tolist()
        kept = context.commit(target_ids, request.drafted, snapshot.unread)
        if request.drafted is not None and request.plan is not None:
            proxy_ids = request.drafted.proxy.target_ids[: request.plan.max_proposals]
            rejected = target_ids[: len(proxy_ids)] != proxy_ids
            self._length.learn(request.plan, max(kept - num_before, 0), rejected, len(request.drafted.proxy.target_ids))
        self._counts.encoded += len(context.draft_ids) - kept
        # The last token of a context is always read again: its logits are what drafting starts from.
        standing = min(request.num_cached, kept)
        request.num_cached = min(standing, max(0, len(context.draft_ids) - 1))
        self._counts.kept += max(0, standing - num_before)
        self._counts.reread += standing - request.num_cached
        request.drafted = request.plan = None

    def allocate(self, request: DraftSequence, present: set[DraftSequence], drafts: bool) -> bool:
        """Find a row and blocks for a context and what may be drafted after it.

        Args:
            request: The sequence.
            present: The sequences of the batch; the others may lose their blocks.
            drafts: Whether anything is to be drafted for it, and so, whether it counts if there is no room.

        Returns:
            Whether there is room.
        """
        need = len(request.context.draft_ids) + self._max_draft_tokens
        if not request.context.draft_ids:
            return False
        if need > self._model.max_model_len:
            self._free(request)
            self._counts.not_drafted["positions"] += drafts
            return False
        pool, had = self._model.pool, request.num_cached
        while True:
            if request.row is None:
                request.row = pool.open_row(request.scope)
            if request.row is not None:
                self._match_prefix(request)
                if pool.grow(request.row, need):
                    draft_ids = request.context.draft_ids
                    request.num_cached = pool.copy_beginning(request.row, draft_ids, request.num_cached)
                    self._counts.reused += max(0, request.num_cached - had)
                    return True
            # Requests that are not in the batch (preempted, or waiting their turn) can read their context again.
            idle = next((r for r in self.by_request.values() if r.row is not None and r not in present), None)
            if idle is None:
                # Its blocks are of use to others only: if all kept what they have, soon none could grow.
                self._free(request)
                self._counts.not_drafted["blocks"] += drafts
                return False
            self._free(idle)

    def prefill(self, requests: Sequence[DraftSequence]) -> tuple[int, list[DraftSequence], torch.Tensor | None]:
        """Read what contexts have and the cache has not, the shortest first, up to the pass's limit.

        Args:
            requests: Sequences with room.

        Returns:
            How many tokens were read, of which requests, and the logits after each ``[requests, vocab]``, if any.
        """
        shortest_first = sorted(requests, key=lambda r: len(r.context.draft_ids) - r.num_cached)
        reading: list[tuple[DraftSequence, Span]] = []
        room = self._model.max_batch_tokens
        for request in shortest_first:
            if room == 0:
                break
            had = request.num_cached
            self._match_prefix(request)  # It may take over what a span before this one is going to write.
            self._counts.reused += request.num_cached - had
            draft_ids = request.context.draft_ids[request.num_cached : request.num_cached + room]
            reading.append((request, Span(request.open_row, request.num_cached, draft_ids)))
            request.num_cached += len(draft_ids)
            self._match_prefix(request)  # Later spans may take over what this one is going to write.
            self._counts.read += len(draft_ids)
            room -= len(draft_ids)
        if not reading:
            return 0, [], None
        reading.sort(key=lambda pair: len(pair[1].draft_ids))  # The last one may have been cut short.
        logits = self._model.forward([span for _, span in reading])
        self._counts.passes += 1
        return self._model.max_batch_tokens - room, [request for request, _ in reading], logits

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their blocks."""
        for request_id in request_ids:
            if request := self.by_request.pop(request_id, None):
                self._free(request)

    def _match_prefix(self, request: DraftSequence) -> None:
        context = request.context
        request.num_cached = self._model.pool.share(
            request.open_row, context.draft_ids, request.num_cached, context.num_settled
        )

    def _free(self, request: DraftSequence) -> None:
        if request.row is not None:
            self._model.pool.close_row(request.row)
        request.row, request.num_cached = None, 0
