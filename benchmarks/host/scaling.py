"""What a step costs beside the models' passes, along four axes: requests, context, proposals, vocabulary.

    python -m benchmarks.host.scaling --data DATA

As `overhead.py` measures it, whose stand-in for the draft model and whose phases these are, with the embedded pair's
tokenizers, both heads padded to the same size. One axis is varied at a time; all points write the same passage, in
shuffled turns. That is done twice: for `host`, tensor work does nothing, as if a device of its own did it; for the
other parts it is done here. DATA has `corpus/` like the tests' (`TOKENTIMING_DATA`).
"""

import argparse
import os
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from benchmarks.common.provenance import DATA, provenance, write_data
from benchmarks.engines.conditions import answer, run_python
from benchmarks.host.overhead import (
    HOST,
    MODELS,
    NUM_PROPOSALS,
    TEXTS,
    Simulation,
    quartiles,
    skip_tensors,
    text_of,
    watch,
)
from benchmarks.report.parts import table
from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft.length import FixedLength
from vllm_tokentiming.transfer.proposals import ProposalBuilder
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair

BASE = {"requests": 1, "context": 1024, "proposals": NUM_PROPOSALS, "vocabulary": 1 << 17}
AXES = {
    "requests": (1, 4, 16, 64, 128),
    "context": (128, 512, 2048, 8192),
    "proposals": (1, 2, 4, 8, 12),
    "vocabulary": (1 << 15, 1 << 16, 1 << 17, 1 << 18),
}
POINTS: list[dict[str, Any]] = [
    {"axis": axis, "at": {**BASE, axis: value}, "mode": mode}
    for axis, values in AXES.items()
    for value in values
    for mode in ("greedy", "sampled")
]
PARTS = {"host": HOST, "transfer": ("transfer",), "any draft": ("any draft",)}


def pair_of(size: int) -> VocabularyPair:
    """The embedded pair, with heads of a size."""
    names = ("target", "draft")
    return VocabularyPair.of(
        *(Vocabulary.of(Tokenizer.from_file(str(MODELS / name / "tokenizer.json")), size) for name in names)
    )


def simulation(pair: VocabularyPair, point: dict[str, int], text: bytes, sampled: bool) -> Simulation:
    """What `overhead.py` measures, at a point; what is written begins at the same place, whatever the context."""
    size, proposals, context = point["vocabulary"], point["proposals"], point["context"]
    lengths = pair.target.token_bytes.lengths[pair.target.encoder.encode(text)]
    begin = int(lengths[: max(AXES["context"]) - context].sum())
    builder = ProposalBuilder(
        pair, Transducer(pair), "tokentiming", draft_size=size, target_size=size, num_proposals=proposals,
        max_draft_tokens=2 * proposals, device=torch.device("cpu"), max_q_bytes=1 << 32, length=FixedLength(),
        truncate=apply_top_k_top_p,
    )  # fmt: skip
    return Simulation(pair, builder, text[begin:], context, sampled, point["requests"], proposals)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Threads, and quartiles of each part, in microseconds for a request and step, at every point.

    Args:
        job: `data`, `steps`, `warm_up`, `threads`, and whether to `skip_tensors`.
    """
    torch.set_num_threads(job["threads"])
    text = text_of(Path(job["data"]), TEXTS["English"], 60_000)
    pairs = {size: pair_of(size) for size in AXES["vocabulary"]}
    running = [simulation(pairs[p["at"]["vocabulary"]], p["at"], text, p["mode"] == "sampled") for p in POINTS]
    if job["skip_tensors"]:
        skip_tensors()
    clock, rng = watch(), random.Random(0)
    spent: list[list[dict[str, float]]] = [[] for _ in POINTS]
    turns = list(zip(POINTS, running, spent, strict=True))
    for number in range(job["warm_up"] + job["steps"]):
        # Shuffled: what comes after a large batch finds the processor's caches full of that.
        for point, simulated, found in rng.sample(turns, len(turns)):
            clock.take()
            simulated.step()
            taken, requests = clock.take(), point["at"]["requests"]
            if number >= job["warm_up"]:
                found.append({n: sum(taken.get(p, 0.0) for p in phases) / requests for n, phases in PARTS.items()})
    us = [{name: quartiles([step[name] for step in steps]) for name in PARTS} for steps in spent]
    return {"us": us, "threads": torch.get_num_threads()}


def main() -> None:
    """Measure every point, print a line for each, and write the data file."""
    if answer(measure):
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("TOKENTIMING_DATA"))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each point")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those")
    parser.add_argument("--threads", type=int, default=1, help="of tensor work; one is what vLLM takes on two cores")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data, or TOKENTIMING_DATA, must name a folder with corpus/")
    job = {"data": args.data, "steps": args.steps, "warm_up": args.warm_up, "threads": args.threads}
    host, tensors = (run_python("benchmarks.host.scaling", {**job, "skip_tensors": skip}) for skip in (True, False))
    results = [
        {**point, "us": {**there, "host": here["host"]}}
        for point, here, there in zip(POINTS, host["us"], tensors["us"], strict=True)
    ]
    print(rows_of(results))
    settings = {"base": BASE, "steps": args.steps, "threads": tensors["threads"]}
    write_data(args.out / "scaling.json", {"provenance": provenance(), "settings": settings, "rows": results})


def rows_of(results: list[dict[str, Any]]) -> str:
    """A line for each point: microseconds for a request and step, medians with quartiles."""
    return table(
        ("axis", "value", "mode", *PARTS),
        [
            (
                r["axis"], f"{r['at'][r['axis']]:,}", r["mode"],
                *(f"{mid:.0f} [{low:.0f}, {high:.0f}]" for low, mid, high in r["us"].values()),
            )
            for r in results
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
