"""Tokens per target pass of every method on one pair, in one run.

    python -m benchmarks.acceptance.acceptance
    python -m benchmarks.acceptance.acceptance --target DIR --draft DIR --pair "Gemma 3 270M <- SmolLM2-135M" \
        --name acceptance_published
    python -m benchmarks.acceptance.acceptance --dtype float32 --temperatures 0 --name greedy

Each method runs in a process of its own, over the same prompts, in groups; the ratio of a group is one observation,
and the interval is a bootstrap over groups. A pass is one step of the target for one request after its first token, so
plain decoding has exactly 1 token per pass, and proposals that vLLM throws away at the end of a request do not count.
All methods propose the same number, whether it pays or not. A run that is cut off goes on where it was: what a method
has written is kept until the commit, or anything else that it depends on, is another one.

At temperature 0, outputs are compared with plain decoding's. In float32 they must be the same, or the run fails; in
smaller types a pass of several tokens may round two nearly equal logits otherwise than a pass of one.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.common import workloads
from benchmarks.common.grid import PLAIN, VLLM_METHODS, with_draft
from benchmarks.common.provenance import provenance, write_data
from benchmarks.common.reduce import different
from benchmarks.engines.conditions import add_options, add_pair, departures, engine_of, run_once

# Of ours, the length never adapts here.
ALWAYS_THE_SAME = [name for name, chosen in VLLM_METHODS.items() if "adaptive_length" not in (chosen or {})]


def measure(
    options: argparse.Namespace, cases: list[dict[str, Any]], plain_temperatures: Sequence[float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let every method write.

    Args:
        options: Of the command line.
        cases: As `measure_vllm.measure` takes them.
        plain_temperatures: At which plain decoding writes too.

    Returns:
        By method, its `conditions` and `rows` as `measure_vllm.measure` gives them; and by method that failed, why.
    """
    job = {
        "target": str(options.target), "engine": engine_of(options), "seed": options.seed, "tokens": options.tokens,
        "seeded": True, "cases": cases,
    }  # fmt: skip
    results, failed = {}, {}
    for name in options.methods:
        temperatures = plain_temperatures if name == PLAIN else options.temperatures
        if not temperatures:
            continue
        speculative = with_draft(name, options.proposals, options.draft, adaptive_length=False)
        try:
            results[name] = run_once(
                "benchmarks.engines.measure_vllm",
                {**job, "speculative": speculative, "temperatures": temperatures},
                f"{options.name}/{name}",
            )
            print(f"{name}: done", flush=True)
        except RuntimeError as error:
            print(f"{name}: FAILED\n{error}", flush=True)
            failed[name] = str(error).strip().splitlines()[-1][:300]
    return results, failed


def reduced(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the report needs: for each method and temperature the tokens and passes of each group."""
    plain = {row["workload"]: row for row in results.get(PLAIN, {"rows": []})["rows"] if row["temperature"] == 0}
    entries = []
    for method, result in results.items():
        for row in result["rows"]:
            entry = {
                "method": method,
                "temperature": row["temperature"],
                "workload": row["workload"],
                **{name: [group[name] for group in row["groups"]] for name in ("tokens", "passes")},
            }
            if row["temperature"] == 0 and row["workload"] in plain and method != PLAIN:
                written, expected = (
                    [ids for group in r["groups"] for ids in group["target_ids"]] for r in (row, plain[row["workload"]])
                )
                entry.update(outputs=len(written), different=different(written, expected))
            entries.append(entry)
    return entries


def main() -> None:
    """Run every method, and write the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair(parser, "acceptance")
    parser.add_argument("--workloads", nargs="+", default=["heldout"], help="kinds of text, see workloads.py")
    parser.add_argument("--num-prompts", type=int, default=208, help="of each kind")
    parser.add_argument("--characters", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="prompts in a batch, and in an observation")
    parser.add_argument("--proposals", type=int, default=5)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 0.8, 1.0])
    parser.add_argument("--methods", nargs="+", choices=VLLM_METHODS, default=ALWAYS_THE_SAME)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    options = parser.parse_args()
    cases, digests = [], {}
    for workload in options.workloads:
        loaded = workloads.load(workload, options.num_prompts, options.characters)
        prompts, digests[workload] = loaded["prompts"], loaded["sha256"]["prompts"]
        if len(prompts) < options.num_prompts or len(prompts) % options.group:
            parser.error(f"{workload} has {len(prompts)} prompts; --num-prompts must be no more, in whole groups.")
        cases.append({"workload": workload, "concurrency": options.group, "prompts": prompts})
    # Plain decoding has 1 token per pass; only its greedy text is of use, which the others' has to be.
    results, failed = measure(options, cases, [t for t in options.temperatures if t == 0])
    rows = reduced(results)
    content = {
        "provenance": provenance(),
        "departures": departures(engine_of(options)),
        "conditions": {name: result["conditions"] for name, result in results.items()},
        "pair": options.pair,
        "settings": {
            name: getattr(options, name)
            for name in ("workloads", "num_prompts", "characters", "tokens", "group", "proposals", "seed")
        },
        "prompts_sha256": digests,
        "failed": failed,
        "rows": rows,
    }
    write_data(options.out / f"{options.name}.json", content)
    problems = [f"{name}: {reason}" for name, reason in failed.items()]
    if options.dtype == "float32":
        problems += [f"{r['method']}: {r['different']} greedy outputs differ" for r in rows if r.get("different")]
    if problems:
        sys.exit("\n".join(["NOT AS IT SHOULD BE:", *problems]))


if __name__ == "__main__":
    main()
