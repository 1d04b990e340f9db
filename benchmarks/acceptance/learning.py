"""How much the draft gains by what it learns while it serves: tokens per target pass, block of requests by block.

    python -m benchmarks.acceptance.learning
    python -m benchmarks.acceptance.learning --target DIR --draft DIR --pair "Gemma 3 270M <- SmolLM2-135M" \
        --name learning_published

For each kind of text and temperature, an engine that learns and one that does not write the same prompts, in blocks of
requests, one after the other. Each is started anew, so it begins with nothing learned but what its warm-up taught (four
short prompts). Requests have no seeds, since seeded ones neither teach nor use what was learned; so the two do not
write the same text, and their difference in a single block is mostly chance. What counts is the difference over many
blocks, for which an interval is given (a bootstrap over pairs of blocks), in the first half of them and in the second.

Every request proposes the same number of tokens in a step, whether it pays or not.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import workloads
from benchmarks.common.grid import OURS, with_draft
from benchmarks.common.provenance import provenance, write_data
from benchmarks.engines.conditions import add_options, add_pair, departures, engine_of, run_once

DRAWS = 2000  # Of the bootstrap.
LEVEL = 0.95


def measure(options: argparse.Namespace, workload: str, prompts: list[str], temperature: float) -> list[dict[str, Any]]:
    """Let an engine with learning write, and one without.

    Args:
        options: Of the command line.
        workload: The kind of text.
        prompts: In whole blocks.
        temperature: Of all requests.

    Returns:
        One row each: by block, the tokens, the passes, and the tokens that had been written before it.
    """
    rows = []
    for learning in (True, False):
        settings: dict[str, Any] = {"adaptive_length": False, "online_learning": learning}
        job = {
            "target": str(options.target), "engine": engine_of(options), "seed": options.seed, "tokens": options.tokens,
            "temperatures": [temperature], "seeded": False,
            "speculative": with_draft(OURS, options.proposals, Path(options.draft), **settings),
            "cases": [{"workload": workload, "concurrency": options.block, "prompts": prompts}],
        }  # fmt: skip
        name = f"{options.name}/{workload.replace('/', '-')}_{temperature:g}_{'on' if learning else 'off'}"
        (row,) = run_once("benchmarks.engines.measure_vllm", job, name)["rows"]
        tokens, passes = ([group[key] for group in row["groups"]] for key in ("tokens", "passes"))
        before = [int(number) for number in np.cumsum([0, *tokens[:-1]])]
        described = {"workload": workload, "temperature": temperature, "learning": learning}
        rows.append({**described, "before": before, "tokens": tokens, "passes": passes})
        print(f"{name}: {sum(tokens) / sum(passes):.3f} tokens per pass", flush=True)
    return rows


def gains(on: dict[str, Any], off: dict[str, Any], seed: int = 0) -> dict[str, list[float]]:
    """Return tokens per pass with learning over those without: by part, the ratio and the ends of its interval.

    Args:
        on: A row with learning.
        off: The same without; its blocks have the same prompts.
        seed: Of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    counts = np.array([on["tokens"], on["passes"], off["tokens"], off["passes"]], dtype=float)
    half = counts.shape[1] // 2
    found = {}
    for name, part in (("all", counts), ("first half", counts[:, :half]), ("second half", counts[:, half:])):
        number = part.shape[1]
        if not number:
            continue
        drawn = part[:, rng.integers(0, number, (DRAWS, number))].sum(-1)
        ratios = [tokens / passes / (others / of_others) for tokens, passes, others, of_others in (part.sum(1), drawn)]
        ends = np.quantile(ratios[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = [float(ratios[0]), *(float(end) for end in ends)]
    return found


def main() -> None:
    """Measure all kinds of text and temperatures, and write the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair(parser, "learning")
    parser.add_argument("--workloads", nargs="+", default=["heldout"], help="kinds of text, see workloads.py")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8])
    parser.add_argument("--num-prompts", type=int, default=400, help="of each kind")
    parser.add_argument("--characters", type=int, default=200, help="of a prompt, at most")
    parser.add_argument("--tokens", type=int, default=64, help="written for each prompt")
    parser.add_argument("--block", type=int, default=4, help="requests at once, and in an observation")
    parser.add_argument("--proposals", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    options = parser.parse_args()
    rows, digests, found = [], {}, []
    for workload in options.workloads:
        loaded = workloads.load(workload, options.num_prompts, options.characters)
        digests[workload] = loaded["sha256"]["prompts"]
        prompts = loaded["prompts"][: len(loaded["prompts"]) // options.block * options.block]
        for temperature in options.temperatures:
            on, off = measure(options, workload, prompts, temperature)
            rows += [on, off]
            found.append({"workload": workload, "temperature": temperature, "gains": gains(on, off)})
            print(found[-1], flush=True)
    names = ("workloads", "num_prompts", "characters", "tokens", "block", "proposals", "seed")
    content = {
        "provenance": provenance(),
        "departures": departures(engine_of(options)),
        "pair": options.pair,
        "settings": {name: getattr(options, name) for name in names},
        "prompts_sha256": digests,
        "gains": found,
        "rows": rows,
    }
    write_data(options.out / f"{options.name}.json", content)


if __name__ == "__main__":
    main()
