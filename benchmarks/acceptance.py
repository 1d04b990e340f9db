"""Tokens per target pass of every method on one pair, in one run.

Each method runs in a process of its own, over the same prompts, in groups; the ratio of a group is one observation,
and the interval is a bootstrap over groups. A pass is one step of the target for one request after its first token, so
plain decoding has exactly 1 token per pass, and proposals that vLLM throws away at the end of a request do not count.

Losslessness is checked in the run: at temperature 0 every method must give the ids of plain decoding.

    python benchmarks/acceptance.py --target examples/models/target --draft examples/models/draft \
        --prompts prompts.json --temperatures 0 0.6 0.8 1.0 --out results.json

``--prompts`` is a JSON list of texts, a JSON object whose values are such lists, or a folder with ``*.heldout.json``
files; by default the corpus in the folder that ``TOKENTIMING_DATA`` names.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Small models on few cores: one thread, or the threads wait for each other. Set by the caller otherwise.
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

# All methods propose the same number, whether it pays or not.
OURS = {"method": "tokentiming", "adaptive_length": False}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "ngram (vLLM)": {"method": "ngram", "prompt_lookup_max": 4},
    "tli (vLLM)": {"method": "draft_model", "use_heterogeneous_vocab": True},
    "slem": {**OURS, "strategy": "slem"},
    "tli": {**OURS, "strategy": "tli"},
    "tokentiming, no prior": {**OURS, "alignment_prior": 0.0},
    "tokentiming": OURS,
}


def load_prompts(source: Path, number: int, characters: int) -> list[str]:
    """``number`` prompts, taken evenly from the parts of the source, cut after ``characters`` characters."""
    if source.is_dir():
        parts = {path.stem: json.loads(path.read_text()) for path in sorted(source.glob("*.heldout.json"))}
    else:
        loaded = json.loads(source.read_text())
        parts = loaded if isinstance(loaded, dict) else {"all": loaded}
    rows = itertools.zip_longest(*(parts[key] for key in sorted(parts)))
    texts = [text[:characters] for row in rows for text in row if text]
    if len(texts) < number:
        raise SystemExit(f"{source} has {len(texts)} prompts, {number} are needed: lower --num-prompts.")
    return texts[:number]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one method; see ``main`` for the job."""
    from vllm import LLM, SamplingParams

    speculative = job["speculative"]
    if speculative is not None:
        speculative = {"num_speculative_tokens": job["proposals"], **speculative}
        if speculative["method"] in ("tokentiming", "draft_model"):
            speculative["model"] = job["draft"]
        # vLLM's own methods are measured with the same repairs of its CPU sampler.
        from vllm_tokentiming import compat

        compat.repair_cpu_rejection_sampler()
        compat.repair_top_k_without_drafts()
    llm = LLM(
        job["target"],
        dtype=job["dtype"],
        max_model_len=2048,
        max_num_seqs=job["group"],
        enforce_eager=True,
        seed=job["seed"],
        speculative_config=speculative,
        disable_log_stats=False,
        enable_prefix_caching=False,
    )

    def count(name: str) -> float:
        found = [m for m in llm.get_metrics() if m.name == name]
        return float(sum(getattr(m, "value", None) or getattr(m, "count", 0) for m in found))

    rows = []
    for temperature in job["temperatures"]:
        for start in range(0, len(job["prompts"]), job["group"]):
            prompts = job["prompts"][start : start + job["group"]]
            parameters = [
                SamplingParams(temperature=temperature, max_tokens=job["tokens"], seed=start + i, ignore_eos=True)
                for i in range(len(prompts))
            ]
            passes, began = count("vllm:inter_token_latency_seconds"), time.perf_counter()
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            seconds = time.perf_counter() - began
            target_ids = [list(output.outputs[0].token_ids) for output in outputs]
            rows.append(
                {
                    "temperature": temperature,
                    "tokens": sum(len(ids) - 1 for ids in target_ids),
                    "passes": count("vllm:inter_token_latency_seconds") - passes,
                    "seconds": seconds,
                    "target_ids": target_ids,
                }
            )
    return {"rows": rows}


def interval(rows: list[dict[str, Any]], repetitions: int = 2000) -> tuple[float, float, float]:
    """Tokens per pass over groups, and its 95 % bootstrap interval."""
    rng = random.Random(0)

    def ratio(sample: list[dict[str, Any]]) -> float:
        return float(sum(r["tokens"] for r in sample) / sum(r["passes"] for r in sample))

    draws = sorted(ratio(rng.choices(rows, k=len(rows))) for _ in range(repetitions))
    return ratio(rows), draws[int(0.025 * repetitions)], draws[int(0.975 * repetitions)]


def main() -> None:
    """Run every method and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parent.parent
    data = os.environ.get("TOKENTIMING_DATA")
    parser.add_argument("--target", default=str(root / "examples/models/target"))
    parser.add_argument("--draft", default=str(root / "examples/models/draft"))
    parser.add_argument("--prompts", type=Path, default=Path(data) / "corpus" if data else None, required=data is None)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--characters", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--group", type=int, default=8, help="prompts in a batch, and in an observation")
    parser.add_argument("--proposals", type=int, default=5)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 0.8, 1.0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        result = measure(json.loads(Path(args.job).read_text()))
        Path(args.job).with_suffix(".result").write_text(json.dumps(result))
        return

    prompts = load_prompts(args.prompts, args.num_prompts, args.characters)
    results: dict[str, Any] = {}
    for name in args.methods:
        job = {
            key: getattr(args, key)
            for key in ("target", "draft", "temperatures", "group", "proposals", "tokens", "dtype", "seed")
        }
        results[name] = run_in_process({**job, "speculative": METHODS[name], "prompts": prompts})
        report(name, results, args.temperatures)
    if args.out:
        import torch
        import vllm

        provenance = {
            "argv": sys.argv[1:],
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=root
            ).stdout.strip(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        }
        for result in results.values():
            for row in result["rows"]:
                del row["target_ids"]
        args.out.write_text(json.dumps({"provenance": provenance, "results": results}, indent=1))


def run_in_process(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one method in a fresh process."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        log = subprocess.run(
            [sys.executable, __file__, "--job", str(path), "--prompts", "."],
            env={**ENVIRONMENT, **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if log.returncode:
            raise SystemExit(f"{job['speculative']} failed:\n{log.stdout[-4000:]}")
        result: dict[str, Any] = json.loads(path.with_suffix(".result").read_text())
        return result


def report(name: str, results: dict[str, Any], temperatures: list[float]) -> None:
    """Print one row: tokens per pass by temperature, and whether the greedy output is plain decoding's."""
    cells = []
    for temperature in temperatures:
        rows = [row for row in results[name]["rows"] if row["temperature"] == temperature]
        ratio, low, high = interval(rows)
        cells.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}]")
    greedy = [
        [r["target_ids"] for r in results[m]["rows"] if r["temperature"] == 0] for m in (name, "plain") if m in results
    ]
    same = "" if len(greedy) < 2 or not greedy[0] else ("identical" if greedy[0] == greedy[1] else "DIFFERENT")
    if name == next(iter(results)):
        print("| method | " + " | ".join(f"T = {t:g}" for t in temperatures) + " | greedy output |")
        print("|---|" + "---|" * (len(temperatures) + 1))
    print(f"| {name} | " + " | ".join(cells) + f" | {same} |", flush=True)


if __name__ == "__main__":
    main()
