"""One step of drafting for a batch: contexts follow their targets, the draft writes, its text becomes proposals.

**Order of a step.** (1) Every context takes in what its target committed, and keeps the KV entries that still stand.
(2) One pass of the draft reads what each context has and the cache has not: a few tokens for a running request, the
next chunk of a prompt for a new one, the shortest first, up to the pass's limit. (3) Requests that have caught up
draft token by token, together, until each has as many target tokens as it may propose. (The last of them may be a
piece of a longer target token. Drafting on until no further text could change it was measured: as many tokens were
accepted, for more passes of the draft.)

**What is not read.** Entries that stand, whoever wrote them: accepted draft tokens, and what another request with the
same beginning has read, be it in the same pass (``draft/kv_pool.py``).

**What is lost when something is missing.** Without a row, blocks, or positions left, a request gets no proposals in
this step; it loses speed and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_tokentiming.context import DraftContext, Drafted
from vllm_tokentiming.draft.length import Chain, FixedLength, History
from vllm_tokentiming.draft.phase_clock import PhaseClock
from vllm_tokentiming.draft.protocol import DraftModel, Span
from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.transfer.proposals import Draft, Writer
from vllm_tokentiming.transfer.stages import Stage
from vllm_tokentiming.vocab.pair import VocabularyPair


@dataclass(frozen=True)
class Committed:
    """One request, as the target left it.

    Attributes:
        request_id: vLLM's id. It may be given to another request once this one has been released.
        target_ids: ``[>= num_target] int32``; prompt and output.
        num_target: How many of them are committed.
        max_proposals: Most target tokens to propose now; 0 while the target itself still reads the prompt.
        sampling: How the draft is to be drawn; ``None`` for a greedy request, or one whose proposals vLLM may cut by
            looking at them.
        greedy: Whether the target takes its likeliest tokens.
        reading: Whether the target still reads the prompt; the draft then reads along.
        reproducible: Whether what is proposed must not depend on what else runs.
        cache_salt: As in vLLM: only requests with the same one share what the draft has read; "" if the user gave
            none. ``None`` if it is not known; then nothing is shared.
        unread: First positions and ends of the ids in the prompt that stand for something other than text.
    """

    request_id: str
    target_ids: npt.NDArray[np.int32]
    num_target: int
    max_proposals: int
    sampling: DraftSampling | None = None
    greedy: bool = False
    reading: bool = False
    reproducible: bool = False
    cache_salt: str | None = None
    unread: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Proposals:
    """What a step proposes.

    Attributes:
        target_ids: Per request, up to ``max_proposals`` target ids.
        q: ``[len(q_request_ids), num_speculative_tokens, target vocabulary] float32``, the law that each was drawn
            from; ``None`` if all are to be verified as one-hot.
        q_request_ids: The requests that ``q`` has rows for: all that have proposals.
        stages: By request and position: of the proposals that are verified in stages; without them, their ``q`` does
            not count.
    """

    target_ids: list[list[int]]
    q: torch.Tensor | None = None
    q_request_ids: list[str] = field(default_factory=list)
    stages: dict[tuple[str, int], list[Stage]] = field(default_factory=dict)


@dataclass
class _Request:
    context: DraftContext
    scope: Hashable  # Of what may be shared.
    row: int | None = None
    num_cached: int = 0  # Leading draft ids whose KV entries are in the row.
    drafted: Drafted | None = None  # What was drafted in the last step.
    chain: Chain | None = None  # How much of it.
    history: History = field(default_factory=History)

    @property
    def caught_up(self) -> bool:
        """Whether all of its context has been read."""
        return self.num_cached == len(self.context.draft_ids)

    @property
    def open_row(self) -> int:
        """Its row, which it has while it is read or drafted for."""
        if self.row is None:
            raise RuntimeError("a request without a row in the draft's KV cache can be neither read nor drafted for")
        return self.row


@dataclass
class Counts:
    """What was done, since the start, in tokens of the draft if nothing else is said.

    Attributes:
        passes: Of the model.
        encoded: Added to contexts by encoding what the target wrote: all but accepted draft tokens.
        read: Of committed contexts, run through the draft.
        reread: Those of them that had entries already: last tokens of contexts, whose logits were needed.
        reused: Of committed contexts, not run, since the cache had them from another request or an earlier row.
        drafted: Written and run through the draft.
        kept: Those of them whose entries stood after verification: they are never in ``read``.
        proposed: Target tokens.
        staged: Those of them that are verified in stages.
        not_drafted: Requests that could have had proposals in a step and got none, by reason: it would not pay
            (``length``), no free blocks (``blocks``), too long a context (``positions``), still reading (``reading``).
    """

    passes: int = 0
    encoded: int = 0
    read: int = 0
    reread: int = 0
    reused: int = 0
    drafted: int = 0
    kept: int = 0
    proposed: int = 0
    staged: int = 0
    not_drafted: Counter[str] = field(default_factory=Counter)


class Drafter:
    """Drafts for all requests of one worker.

    Attributes:
        counts: What it has computed.
        clock: Where its time goes: ``context``, ``read`` (the first pass), ``draft`` (the others), ``write`` (what is
            drawn, proposed, and with which probabilities). On an accelerator, passes end in ``write``, which waits.
        costs: What the passes of the last step cost: kind, tokens and seconds, as ``FixedLength.observe`` takes them.
    """

    def __init__(
        self, pair: VocabularyPair, model: DraftModel, writer: Writer, length: FixedLength, max_draft_tokens: int
    ) -> None:
        """Bring the vocabularies and the model together.

        Args:
            pair: The vocabularies.
            model: The draft model.
            writer: What turns its logits into proposals.
            length: Decides how much to draft.
            max_draft_tokens: Most draft tokens written for a request in a step.
        """
        self._length = length
        self.costs: list[tuple[str, int, float]] = []
        self._pair = pair
        self._model = model
        self._max_draft_tokens = max_draft_tokens
        self._writer = writer
        self._requests: dict[str, _Request] = {}
        self.counts = Counts()
        self.clock = PhaseClock()

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their blocks."""
        for request_id in request_ids:
            if request := self._requests.pop(request_id, None):
                self._close(request)

    def release_all(self) -> None:
        """Forget every request and whatever is in the cache, which cannot be relied on after a fault."""
        self.clock.enter("")
        self.release(list(self._requests))
        self._model.pool.forget_prefixes()

    def numbers(self) -> dict[str, float | dict[str, int] | Counter[str]]:
        """What has been counted since the start, under the names of ``metrics.COUNTERS`` and ``metrics.GAUGES``."""
        counts, pool = self.counts, self._model.pool
        kinds = ("encoded", "read", "reread", "reused", "drafted", "kept")
        return {
            "draft_passes": counts.passes,
            "draft_tokens": {kind: getattr(counts, kind) for kind in kinds},
            "proposed_tokens": counts.proposed,
            "staged_tokens": counts.staged,
            "one_hot": self._writer.one_hot,
            "not_drafted": counts.not_drafted,
            "seconds": self.clock.seconds,
            "draft_blocks": pool.num_blocks,
            "draft_blocks_held": pool.num_blocks - pool.num_free_blocks,
        }

    @torch.inference_mode()
    def propose(self, batch: Sequence[Committed]) -> Proposals:
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

    def _propose(self, batch: Sequence[Committed]) -> Proposals:
        began = time.perf_counter()
        self.costs = []
        requests = [self._request(committed) for committed in batch]
        target_ids: list[list[int]] = [[] for _ in batch]
        # What became of the last drafts is needed for the plan. Other contexts wait until they are used.
        followed = {index for index, request in enumerate(requests) if request.drafted is not None}
        for index in followed:
            self._follow(requests[index], batch[index])
        could = self._chains(batch, requests)
        planned = {id(chain) for chain in self._length.plan(list(could.values()), len(batch))}
        chains = {index: chain for index, chain in could.items() if id(chain) in planned}
        self.counts.not_drafted["length"] += len(could) - len(chains)
        if could and not chains:
            return Proposals(target_ids)
        present = {id(request) for request in requests}
        wanted = [index for index, committed in enumerate(batch) if index in chains or committed.reading]
        for index in wanted:
            if index not in followed:
                self._follow(requests[index], batch[index])
        with_room = [requests[index] for index in wanted if self._has_room(requests[index], present, index in chains)]
        self.clock.enter("read")
        num_read, read, logits = self._catch_up(with_room)
        self.clock.enter("write")
        places = {id(requests[index]): index for index in chains}
        ready = [row for row, request in enumerate(read) if id(request) in places and request.caught_up]
        self.counts.not_drafted["reading"] += sum(requests[index].row is not None for index in chains) - len(ready)
        if not ready or logits is None:
            return Proposals(target_ids)
        if len(ready) < len(read):
            logits = logits[upload(ready, logits.device)]
        drafts = []
        for row in ready:
            index = places[id(read[row])]
            committed, pieces = batch[index], self._writer.pieces_after(read[row].context.draft_ids)
            drafts.append(
                Draft(index, chains[index], committed.sampling, committed.num_target, committed.greedy, pieces=pieces)
            )
        self._writer.begin(drafts)
        self._draft(drafts, requests, logits, began, num_read)
        written = time.perf_counter()
        self._writer.finish(drafts)
        for draft in drafts:
            request = requests[draft.index]
            request.drafted, request.chain = Drafted(draft.draft_ids, draft.proxy), draft.chain
            target_ids[draft.index] = draft.proposed_ids
            self.counts.proposed += len(target_ids[draft.index])
        kind, num_tokens, seconds = self.costs[0]
        self.costs[0] = (kind, num_tokens, seconds + time.perf_counter() - written)
        self.counts.staged += len(self._writer.stages)
        request_ids = [batch[draft.index].request_id for draft in drafts]
        stages = {(request_ids[row], position): found for (row, position), found in self._writer.stages.items()}
        return Proposals(target_ids, self._writer.q, request_ids, stages)

    def _chains(self, batch: Sequence[Committed], requests: Sequence[_Request]) -> dict[int, Chain]:
        """A chain for each request that could draft, by its place in the batch."""
        return {
            index: Chain(
                request.history,
                committed.max_proposals,
                lag=len(request.context.draft_ids)
                - request.num_cached
                + committed.num_target
                - request.context.num_target,
                sampled=committed.sampling is not None,
                fixed=committed.reproducible,
            )
            for index, (request, committed) in enumerate(zip(requests, batch, strict=True))
            if committed.max_proposals
        }

    def _request(self, committed: Committed) -> _Request:
        request = self._requests.get(committed.request_id)
        if request is None or request.context.num_target > committed.num_target:
            self.release([committed.request_id])
            request = self._requests[committed.request_id] = _Request(
                DraftContext(self._pair), object() if committed.cache_salt is None else committed.cache_salt
            )
        return request

    def _follow(self, request: _Request, committed: Committed) -> None:
        """Take in what the target committed since the last time."""
        context = request.context
        num_before = len(context.draft_ids)
        target_ids = committed.target_ids[context.num_target : committed.num_target].tolist()
        kept = context.commit(target_ids, request.drafted, committed.unread)
        if request.drafted is not None and request.chain is not None:
            proxy_ids = request.drafted.proxy.target_ids[: request.chain.max_proposals]
            rejected = target_ids[: len(proxy_ids)] != proxy_ids
            self._length.learn(
                request.chain, max(kept - num_before, 0), rejected, len(request.drafted.proxy.target_ids)
            )
        self.counts.encoded += len(context.draft_ids) - kept
        # The last token of a context is always read again: its logits are what drafting starts from.
        standing = min(request.num_cached, kept)
        request.num_cached = min(standing, max(0, len(context.draft_ids) - 1))
        self.counts.kept += max(0, standing - num_before)
        self.counts.reread += standing - request.num_cached
        request.drafted = request.chain = None

    def _has_room(self, request: _Request, present: set[int], drafts: bool) -> bool:
        """Find a row and blocks for a context and what may be drafted after it; ``drafts`` if anything is to be."""
        need = len(request.context.draft_ids) + self._max_draft_tokens
        if not request.context.draft_ids:
            return False
        if need > self._model.max_model_len:
            self._close(request)
            self.counts.not_drafted["positions"] += drafts
            return False
        pool, had = self._model.pool, request.num_cached
        while True:
            if request.row is None:
                request.row = pool.open_row(request.scope)
            if request.row is not None:
                self._share(request)
                if pool.grow(request.row, need):
                    draft_ids = request.context.draft_ids
                    request.num_cached = pool.copy_beginning(request.row, draft_ids, request.num_cached)
                    self.counts.reused += max(0, request.num_cached - had)
                    return True
            # Requests that are not in the batch (preempted, or waiting their turn) can read their context again.
            idle = next((r for r in self._requests.values() if r.row is not None and id(r) not in present), None)
            if idle is None:
                # Its blocks are of use to others only: if all kept what they have, soon none could grow.
                self._close(request)
                self.counts.not_drafted["blocks"] += drafts
                return False
            self._close(idle)

    def _share(self, request: _Request) -> None:
        context = request.context
        request.num_cached = self._model.pool.share(
            request.open_row, context.draft_ids, request.num_cached, context.num_settled
        )

    def _close(self, request: _Request) -> None:
        if request.row is not None:
            self._model.pool.close_row(request.row)
        request.row, request.num_cached = None, 0

    def _catch_up(self, requests: Sequence[_Request]) -> tuple[int, list[_Request], torch.Tensor | None]:
        """Read what contexts have and the cache has not.

        Returns:
            How many tokens were read, of which requests, and the logits after each ``[requests, vocab]``, if any.
        """
        shortest_first = sorted(requests, key=lambda r: len(r.context.draft_ids) - r.num_cached)
        reading: list[tuple[_Request, Span]] = []
        room = self._model.max_batch_tokens
        for request in shortest_first:
            if room == 0:
                break
            had = request.num_cached
            self._share(request)  # It may take over what a span before this one is going to write.
            self.counts.reused += request.num_cached - had
            draft_ids = request.context.draft_ids[request.num_cached : request.num_cached + room]
            reading.append((request, Span(request.open_row, request.num_cached, draft_ids)))
            request.num_cached += len(draft_ids)
            self._share(request)  # Later spans may take over what this one is going to write.
            self.counts.read += len(draft_ids)
            room -= len(draft_ids)
        if not reading:
            return 0, [], None
        reading.sort(key=lambda pair: len(pair[1].draft_ids))  # The last one may have been cut short.
        logits = self._model.forward([span for _, span in reading])
        self.counts.passes += 1
        return self._model.max_batch_tokens - room, [request for request, _ in reading], logits

    def _draft(
        self, drafts: list[Draft], requests: Sequence[_Request], logits: torch.Tensor, began: float, num_read: int
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
            self._writer.advance(drafts, logits)
            now = time.perf_counter()
            self.costs.append((kind, num_tokens, now - began))
            drafts = [draft for draft in drafts if not draft.done]
            going = self._length.go_on([draft.chain for draft in drafts])
            if len(going) < len(drafts):
                ids = {id(chain) for chain in going}
                drafts = [draft for draft in drafts if id(draft.chain) in ids]
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
