"""Requests come, wait, are preempted and aborted; outputs stay those of plain decoding, and blocks come back.

Every engine here runs under an ``Audit`` of the draft's KV cache.
"""

from __future__ import annotations

import gc
import os

import engine
import pytest
from engine_prompts import long_ids

pytestmark = pytest.mark.engine

BLOCK = 32
NUM_REQUESTS = 8
MAX_TOKENS = 56


class Audit:
    """Checks each pass of the draft.

    Contexts must spell what the target has committed, and what is taken from the cache must have been written
    there. For each KV slot it remembers the token that was written, together with all tokens before it (as a
    chained hash, which begins with the scope of what may be shared).

    Attributes:
        errors: What was wrong, in words.
        tokens_read: Tokens of committed contexts that the draft read.
        read_again: How many of those had their entries in the cache already; the last token of a context,
            which has to be read, is left out.
        num_blocks: Blocks that requests can hold.
    """

    def __init__(self, llm) -> None:
        self.errors: list[str] = []
        self.tokens_read = self.read_again = 0
        self._runner, self._drafter = engine.runner(llm), engine.drafter(llm)
        self._model, self._pool = self._drafter._model, engine.pool(llm)
        self._written: dict[int, int | None] = {}
        self._filed: dict[int, object] = {}  # Blocks that were filed before this pass, and under what.
        self._ids: dict[int, list[int]] = {}  # By row: the sequence in it.
        self._scopes: dict[int, object] = {}  # By row.
        self._contexts: dict[int, list[int]] | None = None
        self.num_blocks = self._pool.num_free_blocks
        self._forward, self._prefill = self._model.forward, self._drafter.sequences.prefill
        self._model.forward, self._drafter.sequences.prefill = self.forward, self.prefill

    def prefill(self, requests):
        pair = self._drafter.sequences._pair
        for request_id, request in self._drafter.sequences.by_request.items():
            state = self._runner.requests.get(request_id)
            if state is None:
                self.errors.append(f"request {request_id} is over")
                continue
            target_ids = [*state.prompt_token_ids, *state.output_token_ids][: request.context.num_target]
            expected = pair.target.token_bytes.decode(target_ids)
            if pair.draft.token_bytes.decode(request.context.draft_ids) != expected:
                self.errors.append(f"the context of {request_id} is not the target's")
        self._contexts = {request.row: request.context.draft_ids for request in requests}
        self._scopes |= {request.row: request.scope for request in requests}
        try:
            return self._prefill(requests)
        finally:
            self._contexts = None

    def forward(self, spans):
        rows = [span.row for span in spans]
        if len(set(rows)) != len(rows):
            self.errors.append(f"rows {rows} in one pass")
        copied = {
            block * BLOCK + offset: self._written.get(source * BLOCK + offset)
            for block, source in self._pool.copies.items()
            for offset in range(BLOCK)
        }
        self._written |= copied
        # What one span writes another one may read in the same pass.
        slots = [self._slots(span) for span in spans]
        written = [slot for span, of_span in zip(spans, slots, strict=True) for slot, _ in of_span[span.start :]]
        filed = self._filed.items() & self._pool._index._entries.items()
        if len(set(written)) != len(written) or {slot // BLOCK for slot in written} & {block for block, _ in filed}:
            self.errors.append("writes where others read")
        for span, of_span in zip(spans, slots, strict=True):
            last = len(self._contexts[span.row]) - 1 if self._contexts is not None else 0
            self.read_again += sum(self._written.get(slot) == chain for slot, chain in of_span[span.start : last])
            self._written |= dict(of_span[span.start :])
        for span, of_span in zip(spans, slots, strict=True):
            for position, (slot, chain) in enumerate(of_span[: span.start]):
                if self._written.get(slot) != chain:
                    self.errors.append(f"slot {slot} does not hold position {position}")
        result = self._forward(spans)
        self._filed = dict(self._pool._index._entries)
        return result

    def _slots(self, span) -> list[tuple[int, int]]:
        """Each position of a sequence up to the end of a span: its slot, and what the slot is to hold."""
        ids, start, end = list(span.draft_ids), span.start, span.start + len(span.draft_ids)
        if self._contexts is None:
            whole = self._ids.get(span.row, [])
            if start != len(whole):
                self.errors.append(f"drafts at {start} after {len(whole)} tokens")
            sequence = whole[:start] + ids
        else:
            whole = self._contexts[span.row]
            sequence = whole[:end]
            if sequence[start:] != ids:
                self.errors.append(f"reads other tokens than its context at {start}")
            self.tokens_read += len(ids)
        self._ids[span.row] = sequence
        chain, slots = hash(self._scopes[span.row]), []
        for position, draft_id in enumerate(sequence):
            chain = hash((chain, draft_id))
            block = int(self._pool.tables[span.row, position // BLOCK])
            if block == 0:
                self.errors.append(f"there is no block for position {position}")
            slots.append((block * BLOCK + position % BLOCK, chain))
        return slots


def _start(draft: dict | None = None, **arguments):
    llm = engine.start_exact(block_size=BLOCK, speculative_config=engine.speculation(**(draft or {})), **arguments)
    return llm, Audit(llm)


def _report(llm, audit: Audit, outputs: list) -> dict:
    """What was written and counted; then, after one more tiny request, what is still held."""
    counters = engine.counters(llm)
    engine.generate(llm, [[5]], engine.greedy(2))
    pool = engine.pool(llm)
    assert pool.block_size == BLOCK
    return {
        "outputs": outputs,
        "counters": counters,
        "errors": list(audit.errors),
        "tokens read": audit.tokens_read,
        "read again": audit.read_again,
        "blocks": audit.num_blocks,
        "blocks held": audit.num_blocks - pool.num_free_blocks,
        "requests known": len(engine.drafter(llm).sequences.by_request),
        "rows held": len(pool.tables) - len(pool._free_rows),
    }


def _abort_and_reuse(llm, prompts: list[list[int]]) -> list:
    """Abort requests in the middle and give ids to other requests at once.

    Returns:
        The index of a prompt and its output, for each request that was not aborted.
    """
    core, prompt_of, written = llm.llm_engine, {}, []

    def add(request_id: str, index: int, max_tokens: int = MAX_TOKENS) -> None:
        prompt_of[request_id] = index
        core.add_request(request_id, {"prompt_token_ids": prompts[index]}, engine.greedy(max_tokens))

    def step() -> list[str]:
        finished = [output for output in core.step() if output.finished]
        for output in finished:
            written.append((prompt_of[output.request_id], list(output.outputs[0].token_ids)))
        return [output.request_id for output in finished]

    for index in range(len(prompts)):
        add(str(index), index, 10 if index == 0 else MAX_TOKENS)
    reused = False
    for _ in range(3):
        step()
    for index in (2, 4, 6):
        core.abort_request([str(index)])
        add(str(index), 7 - index)
    while core.has_unfinished_requests():
        if "0" in step() and not reused:
            add("0", 3)  # The worker has not heard yet that the first one is over.
            reused = True
    return written


def live_through_everything() -> dict:
    """In a fresh process: the same prompts through engines of many kinds."""
    os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
    plain = engine.start_exact(block_size=BLOCK)
    tokenizer = plain.get_tokenizer()
    prompts = [long_ids(tokenizer, 70 - 7 * i, first=20 * i) for i in range(NUM_REQUESTS)]
    parameters = engine.greedy(MAX_TOKENS)
    result = {"plain": engine.generate(plain, prompts, parameters)}
    del plain

    block_bytes = 2 * 2 * BLOCK * 2 * 64 * 4  # Keys and values, layers, tokens, heads, head size, bytes.
    drafts_alone = {"copy_repeats": False}  # Where proposals are counted that the draft can make, or cannot.
    kinds: dict[str, tuple[dict, dict]] = {
        "usual": (drafts_alone, {}),
        "preempted": ({}, {"num_gpu_blocks_override": 14, "max_model_len": 256}),
        "prompts in chunks": ({}, {"max_num_batched_tokens": 32, "max_num_seqs": 4}),
        "prefix caching": ({}, {"enable_prefix_caching": True}),
        "small pool": ({**drafts_alone, "max_model_len": 512, "kv_memory_gib": 18 * block_bytes / 2**30}, {}),
        "draft prefix caching": ({"enable_prefix_caching": True}, {}),
        "short draft": ({**drafts_alone, "max_model_len": 100}, {}),
        "two draft tokens": ({**drafts_alone, "max_draft_tokens": 2}, {}),
    }
    for name, (draft, arguments) in kinds.items():
        llm, audit = _start(draft, **arguments)
        result[name] = _report(llm, audit, engine.generate(llm, prompts, parameters))
        if name == "usual":
            result["again"] = _report(llm, audit, engine.generate(llm, prompts[::-1], parameters))
            result["aborted"] = _report(llm, audit, _abort_and_reuse(llm, prompts))
        if name == "prefix caching":
            result["prefix cached"] = _report(llm, audit, engine.generate(llm, prompts, parameters))
        del llm, audit
        gc.collect()
    return result


@pytest.fixture(scope="module")
def lived():
    return engine.in_fresh_process(live_through_everything)


ALL = (
    "usual", "again", "aborted", "preempted", "prompts in chunks", "prefix caching", "prefix cached",
    "small pool", "draft prefix caching", "short draft", "two draft tokens",
)  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("again", "aborted")])
def test_outputs_are_those_of_plain_decoding(lived, kind):
    assert lived[kind]["outputs"] == lived["plain"]


def test_outputs_in_another_order_are_those_of_plain_decoding(lived):
    assert lived["again"]["outputs"] == lived["plain"][::-1]


def test_an_id_that_is_given_to_another_request_at_once_brings_nothing_of_the_old_one(lived):
    written = lived["aborted"]["outputs"]
    assert sorted(index for index, _ in written) == [0, 1, 1, 3, 3, 3, 5, 5, 7]
    for index, output in written:
        assert output == lived["plain"][index][: 10 if index == 0 else MAX_TOKENS]


@pytest.mark.parametrize("kind", ALL)
def test_the_draft_reads_from_its_cache_only_what_it_wrote_there(lived, kind):
    assert lived[kind]["errors"] == []
    assert lived[kind]["counters"]["faults"] == 0
    assert lived[kind]["tokens read"] > 0


@pytest.mark.parametrize("kind", ALL)
def test_proposals_are_accepted_throughout(lived, kind):
    assert lived[kind]["counters"]["accepted"] > 0


@pytest.mark.parametrize("kind", ALL)
def test_all_that_finished_requests_held_comes_back(lived, kind):
    # The tiny request at the end has finished, too, but the worker hears of that with the next step. It was too short
    # to draft for, so the draft did not read it.
    assert lived[kind]["requests known"] == 1
    assert lived[kind]["rows held"] == 0
    assert lived[kind]["blocks held"] == 0


def test_requests_were_preempted_where_they_should_be(lived):
    assert lived["preempted"]["counters"]["preemptions"] > 0
    assert lived["usual"]["counters"]["preemptions"] == 0


def test_the_size_of_the_targets_cache_is_not_that_of_the_drafts(lived):
    # Each of 16 requests has four draft tokens for a target token, and ten more, or all that the draft allows.
    assert lived["preempted"]["blocks"] == 16 * -(-(4 * 256 + 10) // BLOCK)
    assert lived["usual"]["blocks"] == 16 * 2048 // BLOCK


def test_requests_that_cannot_grow_leave_their_blocks_to_others(lived):
    # The blocks are enough for about half of the requests at a time.
    assert lived["small pool"]["blocks"] == 17
    assert lived["small pool"]["counters"]["drafts"] > 0.5 * lived["usual"]["counters"]["drafts"]


@pytest.mark.parametrize("kind", ["small pool", "short draft"])
def test_requests_for_which_the_draft_has_no_room_go_on_without_proposals(lived, kind):
    assert 0 < lived[kind]["counters"]["drafts"] < 0.8 * lived["usual"]["counters"]["drafts"]


def test_no_more_draft_tokens_are_written_than_the_setting_allows(lived):
    few, usual = lived["two draft tokens"]["counters"], lived["usual"]["counters"]
    assert few["proposed"] / few["drafts"] < 2.5 < usual["proposed"] / usual["drafts"]


def test_accepted_draft_tokens_are_not_read_again(lived):
    assert lived["usual"]["read again"] < 0.02 * lived["usual"]["tokens read"]
