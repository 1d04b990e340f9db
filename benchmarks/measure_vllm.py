"""Measures one cell of the suite in a vLLM engine; `suite.py` starts it."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from phases import Phases


def counters(llm: Any) -> dict[str, Any]:
    """What vLLM has counted so far; a pass is a step of the target for one request after its first token."""
    found: dict[str, Any] = {"passes": 0, "drafts": 0, "proposed": 0, "accepted": 0, "accepted_at": []}
    names = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_draft_tokens": "proposed",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
    }
    for metric in llm.get_metrics():
        if metric.name == "vllm:inter_token_latency_seconds":
            found["passes"] += metric.count
        elif metric.name in names:
            found[names[metric.name]] += metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            found["accepted_at"] = list(metric.values)
    return found


def since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was counted between two calls of `counters`."""
    return {
        name: [b - a for a, b in zip(before[name] or [0] * len(value), value, strict=True)]
        if isinstance(value, list)
        else value - before[name]
        for name, value in after.items()
    }


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a cell.

    Args:
        job: From `suite.py`: `target`, `speculative`, `concurrency`, `workloads` (name to prompts), `temperatures`,
            `tokens`, `seed`.

    Returns:
        For each temperature and workload the phases, and for each group its seconds, what was counted, and what was
        written.
    """
    from vllm import LLM, SamplingParams

    from vllm_tokentiming import compat

    # Without these no sampled speculative decoding is lossless on CPUs; vLLM's own methods get them, too.
    compat.repair_cpu_rejection_sampler()
    compat.repair_top_k_without_drafts()
    size = job["concurrency"]
    llm = LLM(
        job["target"],
        dtype="float32",  # So that rounding, which differs with the batch, does not decide a greedy choice.
        max_model_len=2048,
        max_num_seqs=size,
        enforce_eager=True,
        seed=job["seed"],
        speculative_config=job["speculative"],
        disable_log_stats=False,
        enable_prefix_caching=False,
    )
    for temperature in (0.0, 0.8):
        warm_up = SamplingParams(temperature=temperature, max_tokens=48, ignore_eos=True)
        llm.generate(["Once upon a time", "def main():\n", "Жил был", "All human"] * size, warm_up, use_tqdm=False)
    phases, rows = Phases(llm), []
    for temperature in job["temperatures"]:
        for workload, prompts in job["workloads"].items():
            groups = []
            phases.take()
            for start in range(0, len(prompts), size):
                # No seed: with one, the draft's length could not follow what passes cost.
                parameters = SamplingParams(temperature=temperature, max_tokens=job["tokens"], ignore_eos=True)
                before, began, cpu_began = counters(llm), time.perf_counter(), time.process_time()
                outputs = llm.generate(prompts[start : start + size], parameters, use_tqdm=False)
                seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
                target_ids = [list(output.outputs[0].token_ids) for output in outputs]
                groups.append(
                    {
                        "seconds": seconds,
                        "cpu_seconds": cpu_seconds,
                        "target_ids": target_ids,
                        "counters": {
                            **since(before, counters(llm)),
                            "tokens": sum(len(ids) - 1 for ids in target_ids),  # As for passes, without the first.
                        },
                    }
                )
            rows.append(
                {
                    "temperature": temperature,
                    "workload": workload,
                    "groups": groups,
                    "phases": phases.take(),
                }
            )
    return rows


def main() -> None:
    """Answer `run_python`."""
    path = Path(sys.argv[sys.argv.index("--job") + 1])
    path.with_suffix(".result").write_text(json.dumps({"rows": measure(json.loads(path.read_text()))}))


if __name__ == "__main__":
    main()
