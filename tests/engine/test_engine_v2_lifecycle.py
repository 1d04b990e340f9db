"""On vLLM's model runner V2, no request notices that others are preempted or aborted, or that a part of ours fails."""

from __future__ import annotations

from typing import Any

import engine
import pytest
from engine_prompts import long_ids, texts
from engine_v2 import start
from test_engine_patches import AT_START, CHOICE, listed_for_upstream

pytestmark = pytest.mark.engine

# What is called of ours in a step on runner V2: owner and name.
INNER = (
    ("TokenTimingSpeculator", "_read"),
    ("ProposalsBySlot", "put"),
    ("ProposalsBySlot", "withdraw"),
    ("ProposalsBySlot", "without_fillers"),
    ("ProposalsBySlot", "left_to_verify"),
    ("TokenTimingProposer", "learn"),
)
IN_START = ("init_speculator", "GPUModelRunner.load_model")


def preempt_and_abort() -> dict:
    """In a fresh process: so few blocks that requests are preempted, and some are aborted meanwhile."""
    plain, wanted = start(), engine.greedy(40)
    prompts = [long_ids(plain.get_tokenizer(), 60, first=30 * i) for i in range(4)]
    expected = engine.generate(plain, prompts, wanted)
    del plain
    llm = start({}, num_gpu_blocks_override=11, block_size=32)
    outputs = engine.generate(llm, prompts, wanted)
    preemptions = engine.counters(llm)["preemptions"]
    steps = llm.llm_engine
    for i, prompt in enumerate(prompts):
        steps.add_request(str(i), {"prompt_token_ids": prompt}, wanted)
    finished: dict[str, list[int]] = {}
    for step in range(200):
        if step == 5:
            steps.abort_request([next(iter(engine.runner(llm).req_states.req_id_to_index))], internal=True)
        for output in steps.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        if not steps.has_unfinished_requests():
            break
    engine.generate(llm, [[5]], engine.greedy(2))
    pool = engine.pool(llm)
    return {
        "expected": expected, "outputs": outputs, "finished": finished, "preemptions": preemptions,
        "faults": engine.counters(llm)["faults"], "known": len(engine.drafter(llm).sequences.by_request),
        "held": pool.num_blocks - pool.num_free_blocks,
    }  # fmt: skip


@pytest.fixture(scope="module")
def preempted():
    return engine.in_fresh_process(preempt_and_abort, on_v2=True)


def test_preempted_requests_go_on_as_if_nothing_had_happened(preempted):
    assert preempted["preemptions"] > 0
    assert preempted["outputs"] == preempted["expected"]
    assert preempted["faults"] == 0


def test_an_aborted_request_disturbs_no_other(preempted):
    assert len(preempted["finished"]) == len(preempted["expected"]) - 1
    assert all(ids == preempted["expected"][int(name)] for name, ids in preempted["finished"].items())


def test_what_ended_holds_nothing_of_the_drafts_cache(preempted):
    assert preempted["known"] <= 1
    assert preempted["held"] <= 1


def break_everything() -> dict:
    """In a fresh process: the same requests while one thing of ours after the other fails, in every call."""
    from test_engine_patches import _Fault, _replaced

    from vllm_tokentiming.vllm import faults, patches, runner_v2

    faults._MOST_STEPS_OFF = 0  # Drafting goes on whatever fails, so that there is more to fail.
    prompts = texts(None)[::20][:4]
    wanted = [engine.greedy(6), engine.greedy(6, temperature=0.9, seed=3)] * 2

    def written(llm: Any) -> dict:
        outputs = engine.generate(llm, prompts, wanted)
        return {"greedy": outputs[::2], "lengths": [len(target_ids) for target_ids in outputs]}

    plain = start()
    found: dict = {"plain": written(plain), "patches": {}, "inner": {}}
    del plain
    llm = start({})
    found["whole"] = written(llm)
    for patch in patches.installed():
        fault = _Fault()
        with _replaced(patch, "ours", fault):
            found["patches"][patch.name] = written(llm) | {"raised": fault.num_raised}
    for owner, name in INNER:
        fault = _Fault()
        with _replaced(getattr(runner_v2, owner), name, fault):
            found["inner"][name] = written(llm) | {"raised": fault.num_raised}
    before = engine.counters(llm)["accepted"]
    found["in the end"] = written(llm) | {"accepted": engine.counters(llm)["accepted"] - before}
    return found


@pytest.fixture(scope="module")
def broken():
    return engine.in_fresh_process(break_everything, on_v2=True)


def test_a_patch_that_fails_costs_no_request(broken):
    at_start = {name for name in broken["patches"] if name in (AT_START, *CHOICE) or name.endswith(IN_START)}
    for name, found in broken["patches"].items():
        assert name in at_start or found["raised"] > 0, f"{name} was never called: add requests that call it"
        assert found["greedy"] == broken["plain"]["greedy"], name
        assert found["lengths"] == broken["plain"]["lengths"], name


@pytest.mark.parametrize("name", [name for _, name in INNER])
def test_a_part_of_a_step_that_fails_costs_no_request(broken, name):
    found = broken["inner"][name]
    assert found["raised"] > 0
    assert found["greedy"] == broken["plain"]["greedy"]
    assert found["lengths"] == broken["plain"]["lengths"]


def test_speculation_goes_on_in_the_end(broken):
    assert broken["in the end"]["accepted"] > 0
    assert broken["in the end"]["greedy"] == broken["whole"]["greedy"] == broken["plain"]["greedy"]


def test_the_list_for_upstream_has_every_patch_of_runner_v2_and_no_other(broken):
    of_v2 = {name.rpartition(".")[2] for name in broken["patches"]} - listed_for_upstream("model runner V1")
    assert listed_for_upstream("model runner V2") - {"rejection_sample"} == of_v2
