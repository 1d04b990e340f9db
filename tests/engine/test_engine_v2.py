"""vLLM's model runner V2 writes with us what it writes without us, whatever happens to requests.

Under Triton's interpreter, in which a step takes tenths of a second: so little is written. What is the same on both
runners (drafting, alignment, probabilities) is tested on V1.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import engine
import numpy as np
import pytest
from conftest import longer
from engine_prompts import long_ids, texts
from test_engine_patches import AT_START, CHOICE, listed_for_upstream

pytestmark = pytest.mark.engine

MAX_LEN, MAX_TOKENS, FEW = 256, 8, 4
# By name: the draft's settings, and the engine's.
WAYS: dict[str, tuple[dict, dict]] = {
    "tokentiming": ({}, {}),
    "one at a time": ({}, {"max_num_seqs": 1}),
    "chunks and caches": (
        {},
        {"max_num_batched_tokens": 64, "enable_prefix_caching": True, "block_size": 32, "enable_prompt_embeds": True},
    ),
    "slem": ({"strategy": "slem"}, {}),
    "tli": ({"strategy": "tli"}, {}),
}
# To the runner, the other strategies are no different.
USUAL = tuple(name for name in WAYS if os.environ.get("TOKENTIMING_ALL") or name not in ("slem", "tli"))
COUNTED = ("vllm:spec_decode_num_accepted_tokens", "vllm:tokentiming_draft_passes", "vllm:tokentiming_lessons")
GRAMMAR = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def start(draft: dict | None = None, **arguments) -> Any:
    """An engine on runner V2 with a draft, or alone if `draft` is `None`."""
    given = {"max_model_len": MAX_LEN, "max_num_seqs": FEW, "kernel_config": {"enable_jit_warmup": False}}
    speculative = {} if draft is None else {"speculative_config": engine.speculation(**draft)}
    return engine.start_exact(**{**given, **speculative, **arguments})


def jobs(tokenizer: Any) -> dict[str, tuple[list, list]]:
    """Prompts and parameters of the kinds of requests that are written."""
    prompts = texts(None)
    greedy = engine.greedy(MAX_TOKENS)
    several = {"prompt_token_ids": [315, 272, 1104]}
    return {
        "texts": (prompts[::12][:16], [greedy] * 16),
        "up to the last position": (
            [long_ids(tokenizer, MAX_LEN - left, first=10 * left) for left in (1, 2, 5, 7)],
            [engine.greedy(left + 10) for left in (1, 2, 5, 7)],
        ),
        "penalties and bias": (
            prompts[:4],
            [engine.greedy(MAX_TOKENS, repetition_penalty=1.3), engine.greedy(MAX_TOKENS, presence_penalty=0.5)] * 2,
        ),
        "stop conditions": (
            [several] * 3,
            [engine.greedy(MAX_TOKENS, stop=["."]), engine.greedy(1), engine.greedy(MAX_TOKENS, stop_token_ids=[14])],
        ),
        "a grammar": (["The answer is "] * 2, [_with_grammar(), greedy]),
    }


def _with_grammar() -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return engine.greedy(MAX_TOKENS, structured_outputs=StructuredOutputsParams(json=GRAMMAR))


def write(llm: Any, every: int = 1) -> dict[str, list]:
    """All kinds of requests, of the most numerous one every so many-th."""
    found = {}
    for name, (prompts, wanted) in jobs(llm.get_tokenizer()).items():
        step = every if name == "texts" else 1
        found[name] = engine.generate(llm, prompts[::step], wanted[::step])
    return found


def sampled(llm: Any) -> dict[str, list]:
    """Seeded requests beside a greedy one, and alone."""
    prompts = texts(None)[5:105:50] + texts(None)[:1]
    wanted = [engine.greedy(6, temperature=0.9, seed=seed) for seed in (3, 4)] + [engine.greedy(6)]
    return {
        "together": engine.generate(llm, prompts, wanted),
        "alone": [engine.generate(llm, [prompt], [given])[0] for prompt, given in zip(prompts, wanted, strict=True)],
    }


def logprobs(llm: Any) -> list:
    """Tokens with their log-probabilities, to three digits."""
    wanted = engine.greedy(MAX_TOKENS, logprobs=2)
    outputs = llm.generate(["Once upon a time"], wanted, use_tqdm=False)[0].outputs
    return [
        sorted((target_id, round(entry.logprob, 3)) for target_id, entry in position.items())
        for position in outputs[0].logprobs
    ]


def from_embeddings(llm: Any) -> list:
    """What is written after prompts without tokens, beside one that has them."""
    from safetensors.torch import load_file

    vectors = load_file(f"{engine.TARGET}/model.safetensors")["model.embed_tokens.weight"].float()
    prompts = texts(None)[:2]
    without = [{"prompt_embeds": vectors[llm.get_tokenizer().encode(prompt)]} for prompt in prompts]
    return engine.generate(llm, [*without, prompts[0]], engine.greedy(MAX_TOKENS))


def write_everything() -> dict:
    """In a fresh process: plain, and with every strategy."""
    plain = start(enable_prompt_embeds=True)
    found: dict = {"plain": write(plain), "logprobs": {"plain": logprobs(plain)}}
    found |= {"counters": {}, "runner": {}, "known": {}, "embeddings": [from_embeddings(plain)]}
    del plain
    for name in USUAL:
        draft, arguments = WAYS[name]
        llm = start(draft, **arguments)
        found[name] = write(llm, 1 if name == "tokentiming" else 4)
        if name == "tokentiming":
            found["sampled"] = sampled(llm)
        if arguments.get("enable_prompt_embeds"):
            found["embeddings"].append(from_embeddings(llm))
        found["logprobs"][name] = logprobs(llm)
        found["counters"][name] = engine.counters(llm)
        found["runner"][name] = type(engine.runner(llm)).__mro__[1].__module__
        found["known"][name] = len(engine.drafter(llm).sequences.by_request)
        del llm  # An engine that goes takes vLLM's process groups with it, so it has to go before the next one comes.
    return found


@pytest.fixture(scope="module")
def written():
    return engine.in_fresh_process(write_everything, on_v2=True)


EACH_WAY = pytest.mark.parametrize("way", [pytest.param(name, marks=() if name in USUAL else longer) for name in WAYS])


@EACH_WAY
def test_greedy_output_is_plain_decodings(written, way):
    every = len(written["plain"]["texts"]) // len(written[way]["texts"])
    assert every <= 4
    assert written[way] == written["plain"] | {"texts": written["plain"]["texts"][::every]}


def test_a_seeded_request_writes_beside_others_what_it_writes_alone(written):
    assert written["sampled"]["together"] == written["sampled"]["alone"]


def test_prompts_of_embeddings_are_continued_as_in_plain_decoding(written):
    plain, ours = written["embeddings"]
    assert ours == plain
    assert plain[0] == plain[2]


@EACH_WAY
def test_proposals_are_accepted_on_runner_v2_without_a_fault(written, way):
    counters = written["counters"][way]
    assert written["runner"][way] == "vllm.v1.worker.gpu.model_runner"
    assert 0 < counters["accepted"] < counters["proposed"]
    assert counters["faults"] == 0


@EACH_WAY
def test_logprobs_are_plain_decodings(written, way):
    assert written["logprobs"][way] == written["logprobs"]["plain"]


@EACH_WAY
def test_requests_that_ended_are_forgotten(written, way):
    assert written["known"][way] <= 1  # vLLM tells of an end in the next step.


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


def write_asynchronously() -> dict:
    """In a fresh process: an engine that schedules a step before it knows what the one before has sampled."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    given = {
        "dtype": "float32", "max_model_len": MAX_LEN, "max_num_seqs": FEW, "enforce_eager": True,
        "kernel_config": {"enable_jit_warmup": False}, "enable_prefix_caching": False,
    }  # fmt: skip
    prompts = texts(None)[::30]
    wanted = [engine.greedy(MAX_TOKENS - i % 3) for i in range(len(prompts))]
    wanted += [engine.greedy(6, temperature=0.9, seed=3)] * 2
    prompts += prompts[:1] * 2
    found: dict = {}
    for name, draft in (("plain", None), ("ours", engine.speculation())):
        config = EngineArgs(engine.TARGET, speculative_config=draft, **given).create_engine_config()
        found[f"{name}, by default"] = bool(config.scheduler_config.async_scheduling)
        # vLLM's platform for CPUs does not allow it; what differs is only that nothing runs beside the host here.
        config.scheduler_config.async_scheduling = True
        llm = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        for i, (prompt, parameters) in enumerate(zip(prompts, wanted, strict=True)):
            llm.add_request(str(i), {"prompt": prompt}, parameters)
        written: dict[int, list[int]] = {}
        while llm.has_unfinished_requests():
            for output in llm.step():
                if output.finished:
                    written[int(output.request_id)] = list(output.outputs[0].token_ids)
        found[name] = [written[i] for i in range(len(prompts))]
        core = llm.engine_core.engine_core
        found[f"{name}, in flight"] = core.batch_queue_size
        speculator = getattr(core.model_executor.driver_worker.worker.model_runner, "speculator", None)
        if speculator is not None:
            found["counts"] = speculator.proposer._drafter.counts.proposed
            found["faults"] = sorted(speculator.proposer.guard.places)
        del llm, core, speculator
    return found


def test_scheduled_asynchronously_greedy_output_is_plain_decodings():
    found = engine.in_fresh_process(write_asynchronously, on_v2=True)
    assert found["plain, in flight"] == found["ours, in flight"] == 2
    assert found["ours"][:-2] == found["plain"][:-2]
    assert found["ours"][-1] == found["ours"][-2] and len(found["ours"][-1]) == 6
    assert found["counts"] > 0 and found["faults"] == []
    assert not found["ours, by default"]


def write_with_ranks(ranks: int) -> dict:
    """In a fresh process: greedy, seeded and other sampled requests, with so many ranks."""
    os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
    # vLLM compiles an operation of several ranks in eager engines, too, and asks Triton for the accelerator.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    llm = start({}, tensor_parallel_size=ranks)
    wanted = [engine.greedy(6), engine.greedy(6, temperature=0.9, seed=3), engine.greedy(6, temperature=0.9)]
    outputs = engine.generate(llm, [text for text in texts(None)[::40][:2] for _ in wanted], wanted * 2)
    counted = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTED}
    return {"outputs": outputs, "counted": counted}


@longer
def test_two_ranks_write_what_one_does():
    alone, together = (engine.in_fresh_process(write_with_ranks, on_v2=True, ranks=ranks) for ranks in (1, 2))
    assert together == alone
    assert all(together["counted"].get(name, 0) > 0 for name in COUNTED)


class Recorder:
    """Keeps what the proposer is given and what it proposes."""

    def __init__(self, proposer: Any) -> None:
        self.steps: list[dict] = []
        self._proposer, self._whole = proposer, proposer.propose_batch
        proposer.propose_batch = self

    def __call__(self, read: Any, num_requests: int, num_scheduled: int) -> Any:
        kept: list = []

        def reading() -> Any:
            kept.extend(read())
            return kept

        proposals = self._whole(reading, num_requests, num_scheduled)
        q = proposals.q
        self.steps.append(
            {
                "snapshots": [_described(snapshot) for snapshot in kept],
                "target_ids": dict(zip((s.request_id for s in kept), proposals.target_ids, strict=True)),
                "q": None if q is None else dict(zip(proposals.q_request_ids, _digests(q), strict=True)),
                "stages": sorted([name, position, len(found)] for (name, position), found in proposals.stages.items()),
            }
        )
        return proposals


def _described(snapshot: Any) -> dict:
    import dataclasses

    found = dataclasses.asdict(snapshot)
    return found | {"target_ids": snapshot.target_ids[: snapshot.num_target].tolist()}


def _digests(q: Any) -> list[list[float]]:
    """A few numbers of each request's probabilities that differ if they do."""
    weights = np.random.default_rng(0).random(q.shape[-1]).astype(np.float32)
    return [[float(row @ weights) for row in of_request.numpy()] for of_request in q]


def record(drawn: list[dict]) -> dict[str, list[dict]]:
    """In a fresh process, on either runner: what is drafted for a greedy batch, and a sampled one.

    Args:
        drawn: Steps with snapshots of a sampled batch. If there are any, drafting is done for them, and not for a batch
            of its own, which would be another one: the runners sample differently.
    """
    os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
    llm = start({"enable_prefix_caching": False})
    recorder = Recorder(engine.proposer(llm))
    prompts = texts(None)[::9][:8]
    engine.generate(llm, prompts, engine.greedy(MAX_TOKENS))
    greedy, recorder.steps = recorder.steps, []
    if drawn:
        _replay(recorder, engine.proposer(llm), drawn)
    else:
        engine.generate(llm, prompts, engine.greedy(MAX_TOKENS, temperature=0.9, seed=7))
    return {"greedy": greedy, "drawn": recorder.steps}


def _replay(recorder: Recorder, proposer: Any, steps: list[dict]) -> None:
    from vllm_tokentiming.draft.batch import RequestSnapshot
    from vllm_tokentiming.draft.sampling import DraftSampling

    alive: set[str] = set()
    for step in steps:
        batch = []
        for given in step["snapshots"]:
            sampling = given["sampling"] and DraftSampling(**given["sampling"])
            unread = tuple(map(tuple, given["unread"]))
            ids = np.array(given["target_ids"], dtype=np.int32)
            batch.append(RequestSnapshot(**{**given, "sampling": sampling, "unread": unread, "target_ids": ids}))
        names = {snapshot.request_id for snapshot in batch}
        proposer.release(alive - names)
        alive = names
        recorder(functools.partial(list, batch), len(batch), 1)


def _by_request(steps: list[dict]) -> dict[str, list]:
    """The snapshots and proposals of each request in order, whatever its place in the batch; without empty steps."""
    found: dict[str, list] = {}
    for step in steps:
        for snapshot in step["snapshots"]:
            name = snapshot["request_id"]
            found.setdefault(name, []).append([snapshot, step["target_ids"][name]])
    return found


@pytest.fixture(scope="module")
def recorded():
    on_v2 = engine.in_fresh_process(record, on_v2=True, drawn=[])
    return engine.in_fresh_process(record, drawn=on_v2["drawn"]), on_v2


def test_both_runners_describe_the_same_requests_and_propose_the_same_tokens(recorded):
    on_v1, on_v2 = (found["greedy"] for found in recorded)
    assert any(ids for steps in _by_request(on_v2).values() for _, ids in steps)
    assert _by_request(on_v2) == _by_request(on_v1)


def test_both_runners_draw_the_same_proposals_with_the_same_probabilities(recorded):
    again, drawn = (found["drawn"] for found in recorded)
    assert sum(step["q"] is not None for step in drawn) > 5
    for left, right in zip(drawn, again, strict=True):
        assert left["target_ids"] == right["target_ids"]
        assert left["stages"] == right["stages"]
        assert (left["q"] is None) == (right["q"] is None)
        for name, rows in (left["q"] or {}).items():
            np.testing.assert_allclose(rows, right["q"][name], rtol=1e-4, atol=1e-6)


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


NUM_DRAWS, NUM_TOKENS, TEMPERATURE = 200, 8, 0.25


def verify_one_token(scaled: bool, in_blocks: bool) -> list[int]:
    """In a fresh process: how often the verifier emits each token, for one proposal of each of many requests.

    Args:
        scaled: Whether it gets `log q * T`, as it has to, and not `log q`.
        in_blocks: Whether we decide about the proposals.
    """
    import torch
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    from vllm_tokentiming.drafter import Proposals
    from vllm_tokentiming.vllm import faults, verifier_v2

    class Proposer:
        guard = faults.FaultGuard(lambda: "", lambda: None)
        learn = staticmethod(lambda _target_logits, _lessons: None)

    verifier_v2.install()
    rng = torch.Generator().manual_seed(1)
    p, q = one_token_distributions()
    cpu, slots = torch.device("cpu"), torch.randperm(NUM_DRAWS, generator=rng)
    proposed_ids = torch.multinomial(q, NUM_DRAWS, replacement=True, generator=rng)
    kept = verifier_v2.ProposalsBySlot(Proposer, NUM_DRAWS, cpu)
    names = [str(i) for i in range(NUM_DRAWS)]
    given = Proposals([[i] for i in proposed_ids.tolist()], q.expand(NUM_DRAWS, 1, NUM_TOKENS).clone(), names)
    if in_blocks:
        given.uniforms.update((name, torch.rand(1, generator=rng).tolist()) for name in names)
    kept.put(slots.tolist(), names, given)
    if not scaled:
        kept._q.pow_(1 / TEMPERATURE)
    places = torch.arange(2 * NUM_DRAWS)
    sampled, _ = rejection_sampler.rejection_sample(
        p.log().expand(2 * NUM_DRAWS, NUM_TOKENS).contiguous(),
        kept,
        torch.stack([torch.zeros_like(proposed_ids), proposed_ids], 1).flatten().int(),
        torch.arange(NUM_DRAWS + 1, dtype=torch.int32) * 2,
        places // 2 + places % 2,
        slots,
        slots.repeat_interleave(2),
        (places % 2).int(),
        torch.full((NUM_DRAWS,), TEMPERATURE),
        torch.randint(2**62, (NUM_DRAWS,), generator=rng),
        1,
    )
    assert not Proposer.guard.places
    return torch.bincount(sampled[:, 0].long(), minlength=NUM_TOKENS).tolist()


def one_token_distributions() -> tuple[Any, Any]:
    """The target's distribution of one token, and the one that proposals are drawn from."""
    import torch

    rng = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, NUM_TOKENS, generator=rng).pow(2).add(0.02)
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize(("scaled", "in_blocks"), [(True, False), (True, True), (False, False)])
def test_the_verifier_emits_the_targets_distribution_of_what_was_drawn_from_q(scaled, in_blocks):
    counts = np.array(engine.in_fresh_process(verify_one_token, on_v2=True, scaled=scaled, in_blocks=in_blocks))
    expected = one_token_distributions()[0].double().numpy() * NUM_DRAWS
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # The 99.99 % point of chi-squared with 7 degrees of freedom; the wrong scale is the control, which is caught.
    assert (statistic < 29.88) == scaled, statistic
