"""A prefix that the draft has read is not read again, whoever shares it; outputs stay those of plain decoding.

Every engine here runs under the ``Audit`` of ``test_engine_lifecycle``: what is taken from the cache must have been
written there, for these tokens and in this scope, and what others may read is not written.
"""

from __future__ import annotations

import gc
import pickle

import engine
import pytest
from engine_prompts import long_ids
from test_engine_lifecycle import BLOCK, Audit

pytestmark = pytest.mark.engine

NUM_REQUESTS, NUM_SHARED, NUM_OWN, MAX_TOKENS = 8, 270, 12, 24
BLOCK_BYTES = 2 * 2 * BLOCK * 2 * 64 * 4  # Keys and values, layers, tokens, heads, head size, bytes.


class Run:
    """An engine, and what its draft computes for one lot of prompts after the other."""

    def __init__(self, draft: dict | None = None, **arguments) -> None:
        arguments = {"enable_prefix_caching": True, **arguments}
        # A request that copies in the end leaves what it committed last unread.
        drafting = engine.speculation(copy_repeats=False, **(draft or {}))
        self.llm = engine.start_exact(block_size=BLOCK, speculative_config=drafting, **arguments)
        self.audit, self.drafter, self.pool = Audit(self.llm), engine.drafter(self.llm), engine.pool(self.llm)
        self.context_tokens = 0
        self._release = self.drafter.release
        self.drafter.release = self._count_and_release

    def _count_and_release(self, request_ids) -> None:
        request_ids = list(request_ids)
        for request_id in request_ids:
            if request := self.drafter.sequences.by_request.get(request_id):
                self.context_tokens += len(request.context.draft_ids)
        self._release(request_ids)

    def report(self, prompts: list, write=engine.generate) -> dict:
        """Outputs and what was counted for them alone; afterwards, what is still held."""
        self.context_tokens, before = 0, dict(vars(self.drafter.counts))
        outputs = write(self.llm, prompts, engine.greedy(MAX_TOKENS))
        # They are over, but the worker would hear of that with its next step.
        self.drafter.release(list(self.drafter.sequences.by_request))
        return {
            "outputs": outputs,
            "context tokens": self.context_tokens,
            "counters": engine.counters(self.llm),
            "errors": list(self.audit.errors),
            "blocks": self.audit.num_blocks,
            "blocks held": self.audit.num_blocks - self.pool.num_free_blocks,
            "rows held": len(self.pool.tables) - len(self.pool._free_rows),
            **{name: value - before[name] for name, value in vars(self.drafter.counts).items()},
        }


def _abort_some(llm, prompts: list[list[int]], parameters) -> list[list[int]]:
    """All but every third prompt, which is aborted after some steps."""
    core, outputs = llm.llm_engine, {}
    for index, prompt in enumerate(prompts):
        core.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
    for step in range(10_000):
        if not core.has_unfinished_requests():
            break
        if step == 3:
            core.abort_request([str(index) for index in range(0, len(prompts), 3)])
        for output in core.step():
            if output.finished:
                outputs[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
    return [outputs.get(index, []) for index in range(len(prompts))]


def _salted(llm, prompts: list[list[int]], parameters) -> list[list[int]]:
    """The prompts under two salts, and one of them a second time."""
    return [
        list(output.outputs[0].token_ids)
        for salt in ("one", "other", "one")
        for output in llm.generate(
            [{"prompt_token_ids": prompt, "cache_salt": salt} for prompt in prompts], parameters, use_tqdm=False
        )
    ]


def share_everything() -> dict:
    """In a fresh process: prompts with one beginning, through engines of many kinds."""
    plain = engine.start_exact(block_size=BLOCK)
    text = long_ids(plain.get_tokenizer(), 2 * NUM_SHARED)
    prompts = [text[:NUM_SHARED] + long_ids(plain.get_tokenizer(), NUM_OWN, first=20 * i) for i in range(NUM_REQUESTS)]
    others = [text[NUM_SHARED + 40 * i :][:150] for i in range(4)]  # They share nothing.
    result: dict = {
        "plain": engine.generate(plain, prompts, engine.greedy(MAX_TOKENS)),
        "plain, others": engine.generate(plain, others, engine.greedy(MAX_TOKENS)),
    }
    del plain

    run = Run()
    result["usual"] = run.report(prompts)
    result["again"] = run.report(prompts)
    result["others"] = run.report(others)
    result["longer"] = run.report([[*prompt, 7] for prompt in prompts])
    result["aborted"] = run.report(prompts, write=_abort_some)
    run.drafter.release_all()
    result["forgotten"] = run.report(prompts)
    result["salted"] = run.report(prompts[:1], write=_salted)
    result["salts kept"] = len(engine.proposer(run.llm).reader._cache_salts)

    small = {"max_model_len": 512, "kv_memory_gib": 23 * BLOCK_BYTES / 2**30}
    for kind, draft, arguments in (
        ("off", {}, {"enable_prefix_caching": False}),
        ("off for the draft", {"enable_prefix_caching": False}, {}),
        ("on for the draft", {"enable_prefix_caching": True}, {"enable_prefix_caching": False}),
        ("prompts in chunks", {}, {"max_num_batched_tokens": 64, "max_num_seqs": 4}),
        ("preempted", {}, {"num_gpu_blocks_override": 18, "max_model_len": 512}),
        ("small pool", small, {}),
    ):
        del run
        gc.collect()
        run = Run(draft, **arguments)
        result[kind] = run.report(prompts)
        if kind == "small pool":
            result["small pool, others"] = run.report(others)
            result["small pool, again"] = run.report(prompts)
    return result


@pytest.fixture(scope="module")
def shared():
    return engine.in_fresh_process(share_everything)


KINDS = (
    "usual", "again", "longer", "forgotten", "off", "off for the draft", "on for the draft", "prompts in chunks",
    "preempted", "small pool", "small pool, again",
)  # fmt: skip
ALL = (*KINDS, "others", "small pool, others", "aborted", "salted")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "longer"])
def test_outputs_are_those_of_plain_decoding(shared, kind):
    assert shared[kind]["outputs"] == shared["plain"]


@pytest.mark.parametrize("kind", ["others", "small pool, others"])
def test_outputs_of_prompts_that_share_nothing_are_those_of_plain_decoding(shared, kind):
    assert shared[kind]["outputs"] == shared["plain, others"]


def test_requests_go_on_when_others_that_share_with_them_are_aborted(shared):
    for index, (output, plain) in enumerate(zip(shared["aborted"]["outputs"], shared["plain"], strict=True)):
        assert output == (plain if index % 3 else [])


@pytest.mark.parametrize("kind", ALL)
def test_the_draft_reads_what_was_written_and_writes_where_nobody_else_reads(shared, kind):
    assert shared[kind]["errors"] == []
    assert shared[kind]["counters"]["faults"] == 0


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_held_afterwards(shared, kind):
    assert shared[kind]["blocks held"] == shared[kind]["rows held"] == 0


@pytest.mark.parametrize("kind", ["usual", "again", "others", "forgotten", "off", "on for the draft"])
def test_each_token_of_a_context_is_read_once_or_taken_over_or_kept(shared, kind):
    counted = shared[kind]
    assert counted["kept"] > 0
    entries = counted["read"] - counted["reread"] + counted["reused"] + counted["kept"]
    # Where the end of a text becomes other tokens when it goes on, it is read as those.
    assert counted["context tokens"] <= entries <= 1.02 * counted["context tokens"]


@pytest.mark.parametrize("kind", ["usual", "again", "forgotten", "off", "prompts in chunks", "on for the draft"])
def test_almost_no_token_is_read_again(shared, kind):
    assert shared[kind]["reread"] <= 0.02 * shared[kind]["read"]


@pytest.mark.parametrize("kind", ["usual", "forgotten", "on for the draft", "prompts in chunks"])
def test_a_shared_prompt_costs_the_draft_once(shared, kind):
    """Less than a block of it is read by each request: that in which they part."""
    prompt = (shared["off"]["read"] - shared[kind]["read"]) / (NUM_REQUESTS - 1)
    assert prompt > NUM_SHARED - BLOCK  # The draft needs at least as many tokens for the text as the target.
    assert shared[kind]["reused"] >= (NUM_REQUESTS - 1) * (NUM_SHARED - BLOCK)


@pytest.mark.parametrize("kind", ["off", "off for the draft"])
def test_without_prefix_caching_nothing_is_taken_over(shared, kind):
    assert shared[kind]["reused"] == 0


def test_prompts_are_found_again_after_their_requests_have_ended(shared):
    again, usual = shared["again"], shared["usual"]
    own = (usual["context tokens"] - NUM_REQUESTS * NUM_SHARED) / NUM_REQUESTS
    assert again["reused"] >= usual["context tokens"] - NUM_REQUESTS * (own + BLOCK)
    assert again["reused"] % BLOCK, "also the beginning of a block that goes on otherwise"


def test_what_is_forgotten_is_read_again(shared):
    assert shared["forgotten"]["read"] == pytest.approx(shared["usual"]["read"], rel=0.05)


def test_prompts_that_share_nothing_are_all_read(shared):
    assert shared["others"]["reused"] <= 4 * 2


def test_requests_share_only_with_those_of_the_same_salt(shared):
    assert shared["salted"]["outputs"] == 3 * shared["plain"][:1]
    # The first two find nothing, though the prompt is in the cache without a salt, too.
    assert NUM_SHARED - BLOCK < shared["salted"]["reused"] <= shared["salted"]["context tokens"] / 3
    assert shared["salts kept"] <= 1


def test_preempted_requests_find_what_they_had(shared):
    assert shared["preempted"]["counters"]["preemptions"] > 0
    assert shared["preempted"]["read"] < 0.5 * shared["off"]["read"]


def test_a_pool_too_small_for_all_serves_more_when_they_share(shared):
    assert shared["small pool"]["blocks"] == 22
    assert shared["small pool"]["read"] < 0.7 * shared["off"]["read"]
    assert shared["small pool"]["counters"]["drafts"] > 0.5 * shared["usual"]["counters"]["drafts"]


def test_a_salt_travels_to_the_worker():
    from types import SimpleNamespace

    from vllm_tokentiming.vllm import compat, plugin

    plugin.register()
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request

    def new(request_id: str, **arguments):
        parameters = engine.greedy()
        request = Request(request_id, [1, 2], parameters, None, **arguments)
        return pickle.loads(pickle.dumps(NewRequestData.from_request(request, ([1],))))

    unknown = NewRequestData("unknown", [1], [], None, None, ([1],), 0, None)
    output = SimpleNamespace(scheduled_new_reqs=[new("a", cache_salt="salt"), new("b"), unknown])
    assert compat.cache_salts(output) == {"a": "salt", "b": ""}
