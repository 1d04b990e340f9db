"""What a draft step costs here and in vLLM's own method, with the same draft model, batch and text.

    python benchmarks/draft_step.py --draft DIR --out draft_step.json

DIR is a draft with the target's own tokenizer, which both can run (`same_vocab_draft.py`). Engines of both kinds take
turns, each in a process of its own. What is compared is all that a proposer does in a step, divided by its passes of
the draft: model, bookkeeping, and what is added over the vocabulary. Greedy, so both write the same drafts.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from pass_times import run_python
from provenance import provenance

PROPOSALS, TOKENS = 5, 96
METHODS: dict[str, dict[str, Any]] = {
    "tokentiming": {"method": "tokentiming", "adaptive_length": False},
    "draft_model (vLLM)": {"method": "draft_model"},
}
ROOT = Path(__file__).resolve().parent.parent


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of drafting per pass of the draft, and of the pass alone, in one engine."""
    from phases import Phases
    from vllm import LLM, SamplingParams

    speculative = {**job["speculative"], "model": job["draft"], "num_speculative_tokens": PROPOSALS}
    llm = LLM(
        job["target"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=job["batch"],
        enforce_eager=True,
        enable_prefix_caching=False,
        speculative_config=speculative,
        disable_log_stats=False,
    )
    prompts = [f"{i} children went to the market and" for i in range(job["batch"])]
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    phases = Phases(llm)
    llm.generate(prompts, parameters, use_tqdm=False)
    phases.take()
    llm.generate(prompts, parameters, use_tqdm=False)
    found = phases.take()
    passes = found["draft pass"]
    return {
        "per_pass": found["drafting"]["seconds"] / passes["calls"],
        "model_alone": passes["median"],
        "passes_per_step": passes["calls"] / found["drafting"]["calls"],
    }


def main() -> None:
    """Measure both in turns, and print the ratios of neighbours."""
    if "--job" in sys.argv:
        path = Path(sys.argv[sys.argv.index("--job") + 1])
        path.with_suffix(".result").write_text(json.dumps(measure(json.loads(path.read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(ROOT / "examples/models/target"))
    parser.add_argument("--draft", required=True, help="with the target's tokenizer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for batch in options.batches:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
        for repetition in range(options.repetitions):
            for name in list(METHODS)[:: 1 if repetition % 2 else -1]:
                job = {"target": options.target, "draft": options.draft, "batch": batch, "speculative": METHODS[name]}
                rows[name].append(run_python("draft_step.py", job))
        results[batch] = rows
        ours, theirs = ([row["per_pass"] for row in rows[name]] for name in METHODS)
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"batch {batch}: microseconds per draft step {1e6 * statistics.median(ours):.0f} here,"
            f" {1e6 * statistics.median(theirs):.0f} in vLLM's method;"
            f" ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps({"provenance": provenance(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
