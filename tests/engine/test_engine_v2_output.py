"""vLLM's model runner V2 writes with us what it writes without us, by every strategy and with several ranks."""

from __future__ import annotations

import os
from typing import Any

import engine
import pytest
from conftest import longer
from engine_prompts import long_ids, texts
from engine_v2 import FEW, MAX_LEN, MAX_TOKENS, start

pytestmark = pytest.mark.engine

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
