"""Measures one method in a vLLM engine; `suite.py`, `acceptance.py` and `languages.py` start it."""

import time
from typing import Any

import psutil

from benchmarks.engines.conditions import answer, conditions, start
from benchmarks.engines.phases import Phases

WARM_UP = ("Once upon a time", "def main():\n", "Жил был", "All human")


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


def processor_seconds() -> float:
    """Seconds that processors have worked for anything but this process and those it started."""
    times = psutil.cpu_times()
    me = psutil.Process()
    own = 0.0
    for process in [me, *me.children(recursive=True)]:
        spent = process.cpu_times()
        own += spent.user + spent.system
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - own)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Let an engine write.

    Args:
        job: `target`, `speculative`, `engine` (from `conditions.engine_of`), `seed`, `tokens` of each output,
            `temperatures`, `cases` (each with `workload`, `concurrency`, `prompts`), and `seeded` (whether each request
            has a seed of its own; then the draft's length does not follow what passes cost).

    Returns:
        The `conditions`, and `rows`: for each temperature and case the phases, and for each group of requests its
        seconds, the share of the machine that other processes took meanwhile, what was counted, and what was written.
    """
    from vllm import SamplingParams

    llm = start(job["target"], job["speculative"], job["engine"], job["seed"])

    def generate(prompts: list[str], temperature: float, first_seed: int | None = None) -> list[Any]:
        seeds = [None if first_seed is None else first_seed + i for i in range(len(prompts))]
        given = [
            SamplingParams(temperature=temperature, max_tokens=job["tokens"], ignore_eos=True, seed=seed)
            for seed in seeds
        ]
        outputs: list[Any] = llm.generate(prompts, given, use_tqdm=False)
        return outputs

    for concurrency in sorted({case["concurrency"] for case in job["cases"]}):
        for temperature in sorted({0.0, max(job["temperatures"])}):
            generate([WARM_UP[i % len(WARM_UP)] for i in range(concurrency)], temperature)
    phases, rows = Phases(llm), []
    for temperature in job["temperatures"]:
        for case in job["cases"]:
            groups, size = [], case["concurrency"]
            for begin in range(0, len(case["prompts"]), size):
                before, began, others = counters(llm), time.perf_counter(), processor_seconds()
                outputs = generate(case["prompts"][begin : begin + size], temperature, begin if job["seeded"] else None)
                seconds, others = time.perf_counter() - began, processor_seconds() - others
                target_ids = [list(output.outputs[0].token_ids) for output in outputs]
                groups.append(
                    {
                        "seconds": seconds,
                        "others": max(0.0, others) / seconds / (psutil.cpu_count() or 1),
                        "target_ids": target_ids,
                        # As for passes, without the first token.
                        **since(before, counters(llm)),
                        "tokens": sum(len(ids) - 1 for ids in target_ids),
                    }
                )
            described = {"workload": case["workload"], "concurrency": size, "temperature": temperature}
            rows.append({**described, "groups": groups, "phases": phases.take()})
    return {"conditions": conditions(llm), "rows": rows}


if __name__ == "__main__":
    answer(measure)
