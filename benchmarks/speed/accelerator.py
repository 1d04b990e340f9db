"""Tokens a second on an accelerator, beside what vLLM does without a draft there.

    python -m benchmarks.speed.accelerator --target DIR --draft DIR --pair NAME [--batches 1 8 32]

Without a draft vLLM takes its newest model runner and schedules ahead; a custom proposer gets neither. So the question
of a user is not what drafting brings to the engine that drafts, but which of two engines is faster, each as vLLM starts
it. All engines are started at once, since compiling takes longest, and are timed in turns, each while the others wait.
"""

import argparse
import fcntl
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common.grid import PLAIN
from benchmarks.common.provenance import DATA, RAW, ROOT, provenance, write_data
from benchmarks.engines.conditions import add_options, answer, conditions, departures, engine_of, run_python, start
from benchmarks.engines.measure_vllm import counters, since
from benchmarks.exactness.repeatability import METHODS, PROPOSALS, speculative


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Start one engine, and time it while no other one is timed."""
    from vllm import SamplingParams

    llm = start(job["target"], job["speculative"], job["engine"])
    prompts, rows = job["prompts"], []

    def write(batch: int, temperature: float) -> list[list[int]]:
        wanted = SamplingParams(temperature=temperature, max_tokens=job["tokens"], ignore_eos=True)
        outputs = llm.generate(prompts[:batch], wanted, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    with open(job["lock"], "w") as lock:
        for temperature in job["temperatures"]:
            for batch in job["batches"]:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write(batch, temperature)
                before, seconds = counters(llm), []
                for _ in range(job["rounds"]):
                    began = time.perf_counter()
                    target_ids = write(batch, temperature)
                    seconds.append(time.perf_counter() - began)
                counted = since(before, counters(llm))
                fcntl.flock(lock, fcntl.LOCK_UN)
                rows.append(
                    {
                        "temperature": temperature, "batch": batch,
                        "tokens_per_second": [batch * job["tokens"] / each for each in seconds],
                        # As for passes, without the first token.
                        "tokens_per_pass": job["rounds"] * batch * (job["tokens"] - 1) / counted["passes"],
                        "target_ids": target_ids if temperature == 0 else None,
                    }
                )  # fmt: skip
    return {"conditions": conditions(llm), "rows": rows}


def main() -> None:
    """Measure, and write the data file."""
    if answer(measure):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--pair", required=True, help="its name in the report")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--tokens", type=int, default=128, help="of each output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--kv-gib", type=float, default=4, help="the target's KV cache in each engine, on an accelerator"
    )
    parser.add_argument("--name", default="accelerator", help="of the data file")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    add_options(parser)
    options = parser.parse_args()
    import torch

    shared = {}
    if torch.cuda.is_available():
        shared = {"kv_cache_memory_bytes": int(options.kv_gib * 2**30), "gpu_memory_utilization": 0.9 / len(METHODS)}
    prompts = [prompt["text"] for prompt in json.loads((ROOT / "examples/prompts.json").read_text())]
    most = max(options.batches)
    RAW.mkdir(parents=True, exist_ok=True)
    job = {
        "target": str(options.target), "engine": {**shared, **engine_of(options)},
        "lock": str(RAW / "accelerator.lock"),
        "prompts": (prompts * -(-most // len(prompts)))[:most], "batches": options.batches, "tokens": options.tokens,
        "temperatures": options.temperatures, "rounds": options.rounds,
    }  # fmt: skip

    def run(method: str) -> dict[str, Any]:
        return run_python("benchmarks.speed.accelerator", {**job, "speculative": speculative(method, options.draft)})

    with ThreadPoolExecutor(len(METHODS)) as engines:
        found = dict(zip(METHODS, engines.map(run, METHODS), strict=True))
    expected = {(row["temperature"], row["batch"]): row["target_ids"] for row in found[PLAIN]["rows"]}
    rows = []
    for method, measured in found.items():
        for row in measured["rows"]:
            target_ids, wanted = row.pop("target_ids"), expected[row["temperature"], row["batch"]]
            same = sum(a == b for a, b in zip(target_ids, wanted, strict=True)) if target_ids else None
            rows.append({"method": method, **row, "same_greedy": same})
    content = {
        "provenance": provenance(),
        "departures": [*departures(engine_of(options)), "all engines share the device, each alone while it is timed"],
        "pair": options.pair,
        "conditions": {method: measured["conditions"] for method, measured in found.items()},
        "settings": {"tokens": options.tokens, "rounds": options.rounds, "proposals": PROPOSALS},
        "rows": rows,
    }
    write_data(options.out / f"{options.name}.json", content)


if __name__ == "__main__":
    main()
