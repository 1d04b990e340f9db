"""How often greedy and seeded output repeats itself in a model's own type, with and without speculation.

    python -m benchmarks.exactness.repeatability [--target DIR --draft DIR --pair NAME --name repeatability_published]

In bfloat16, passes of other shapes round otherwise, and two tokens that are nearly equally likely may change places.
Each prompt is written alone, alone again, and together with all others: by plain decoding, and with a draft of adaptive
and of fixed length, each in a process of its own. What is compared is the text that plain decoding writes alone. Where
a greedy text first differs from it, plain decoding is asked how far apart the two tokens are.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.grid import OURS, PLAIN, with_draft
from benchmarks.common.provenance import provenance, write_data
from benchmarks.common.workloads import load
from benchmarks.engines.conditions import (
    add_options,
    add_pair,
    answer,
    conditions,
    departures,
    engine_of,
    run_once,
    run_python,
    start,
)

PROPOSALS = 6
# Our settings in each.
METHODS: dict[str, dict[str, Any]] = {PLAIN: {}, OURS: {}, f"{OURS}, fixed length": {"adaptive_length": False}}
WAYS = ("alone", "alone again", "together")


def speculative(method: str, draft: Path) -> dict[str, Any] | None:
    """vLLM's speculative configuration of one of `METHODS`."""
    return with_draft(method.partition(",")[0], PROPOSALS, draft, **METHODS[method])


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """All prompts in all ways with one engine; or how far apart pairs of tokens are."""
    from vllm import SamplingParams

    llm = start(job["target"], job["speculative"], job["engine"])
    if "asked" in job:
        return {"gaps": [_gap(llm, *asked) for asked in job["asked"]]}
    prompts = job["prompts"]
    written: dict[str, Any] = {"conditions": conditions(llm)}
    for kind, temperature in (("greedy", 0.0), ("seeded", 0.8)):
        wanted = [
            SamplingParams(temperature=temperature, seed=i, max_tokens=job["tokens"], ignore_eos=True)
            for i in range(len(prompts))
        ]
        found: dict[str, list[list[int]]] = {}
        for way in WAYS:
            if way == "together":
                outputs = llm.generate(prompts, wanted, use_tqdm=False)
            else:
                outputs = [llm.generate(p, w, use_tqdm=False)[0] for p, w in zip(prompts, wanted, strict=True)]
            found[way] = [list(output.outputs[0].token_ids) for output in outputs]
        written[kind] = found
    tokenizer = llm.get_tokenizer()
    return {**written, "prompt_ids": [list(tokenizer.encode(prompt)) for prompt in prompts]}


def _gap(llm: Any, context_ids: list[int], target_id: int) -> float | None:
    """How much less likely a token is than the likeliest; ``None`` if it is not among the likeliest twenty."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    logprobs = llm.generate({"prompt_token_ids": context_ids}, wanted, use_tqdm=False)[0].outputs[0].logprobs[0]
    found = logprobs.get(target_id)
    return None if found is None else max(entry.logprob for entry in logprobs.values()) - found.logprob


def first_difference(left: list[int], right: list[int]) -> int | None:
    """The first place at which two lists differ."""
    return next((place for place, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)


def main() -> None:
    """Measure, and write the data file."""
    if answer(measure):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair(parser, "repeatability")
    # All together fit into one pass: vLLM on CPUs dies of a seeded request whose prompt is read in chunks, in plain
    # decoding, too ("CPU Generator does not use offset", 0.32.0).
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--workload", default="heldout", help="see workloads.py")
    parser.add_argument("--characters", type=int, default=200, help="where prompts are cut")
    add_options(parser)
    options = parser.parse_args()
    prompts = load(options.workload, options.num_prompts, options.characters)["prompts"]
    job = {"target": str(options.target), "prompts": prompts, "tokens": options.tokens, "engine": engine_of(options)}
    written: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        written[method] = run_once(
            "benchmarks.exactness.repeatability",
            {**job, "speculative": speculative(method, options.draft)},
            f"{options.name}/{method}",
        )
        print(f"{method}: written", flush=True)
    reference, prompt_ids = written["plain"]["greedy"]["alone"], written["plain"]["prompt_ids"]
    places, asked = [], []
    for method in METHODS:
        for way in WAYS:
            pairs = zip(prompt_ids, reference, written[method]["greedy"][way], strict=True)
            for context, left, right in pairs:
                if (place := first_difference(left, right)) is not None:
                    places.append((method, way))
                    asked.append((context + left[:place], right[place]))
    gaps = []
    if asked:
        gaps = run_python("benchmarks.exactness.repeatability", {**job, "speculative": None, "asked": asked})["gaps"]
    rows = []
    for method in METHODS:
        for way in WAYS:
            far = [gap for place, gap in zip(places, gaps, strict=True) if place == (method, way)]
            known = [gap for gap in far if gap is not None]
            seeded = written[method]["seeded"]
            rows.append(
                {
                    "method": method, "way": way, "outputs": len(prompts), "same_greedy": len(prompts) - len(far),
                    "median_gap": median(known) if known else None, "largest_gap": max(known, default=None),
                    "gaps_beyond_the_likeliest": len(far) - len(known),
                    "same_seeded": sum(a == b for a, b in zip(seeded["alone"], seeded[way], strict=True)),
                }
            )  # fmt: skip
    content = {
        "provenance": provenance(),
        "departures": departures(engine_of(options)),
        "pair": options.pair,
        "conditions": {method: found["conditions"] for method, found in written.items()},
        "settings": {"num_prompts": len(prompts), "tokens": options.tokens, "proposals": PROPOSALS},
        "rows": rows,
    }
    write_data(options.out / f"{options.name}.json", content)


if __name__ == "__main__":
    main()
