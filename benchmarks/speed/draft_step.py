"""What a draft step costs here and in vLLM's own method, with the same draft model, batch and text.

    python -m benchmarks.speed.draft_step

The draft has the target's own tokenizer, so both can run it: by default one with the embedded draft's body and random
weights, since what a step costs does not depend on what the draft knows. Engines of both kinds take turns, each in a
process of its own. What is compared is all that a proposer does in a step, divided by its passes of the draft: model,
bookkeeping, and what is added over the vocabulary. Greedy, so both write the same drafts.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import DATA, ROOT, provenance, write_data
from benchmarks.engines.conditions import add_options, answer, conditions, departures, engine_of, run_python, start

PROPOSALS = 5
METHODS: dict[str, dict[str, Any]] = {
    "tokentiming": {"method": "tokentiming", "adaptive_length": False},
    "draft_model (vLLM)": {"method": "draft_model"},
}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """By batch, seconds of drafting per pass of the draft, and of the pass alone, in one engine."""
    from vllm import SamplingParams

    from benchmarks.engines.phases import Phases

    speculative = {**job["speculative"], "model": job["draft"], "num_speculative_tokens": PROPOSALS}
    llm = start(job["target"], speculative, job["engine"])
    parameters = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    phases, batches = Phases(llm), {}
    for batch in job["batches"]:
        prompts = [f"{i} children went to the market and" for i in range(batch)]
        llm.generate(prompts, parameters, use_tqdm=False)  # Warm-up
        phases.take()
        llm.generate(prompts, parameters, use_tqdm=False)
        found = phases.take()
        passes = found["draft pass"]
        batches[str(batch)] = {
            "per_pass": found["drafting"]["seconds"] / passes["calls"],
            "model_alone": passes["median"],
            "passes_per_step": passes["calls"] / found["drafting"]["calls"],
        }
    return {"conditions": conditions(llm), "batches": batches}


def random_draft(target: Path, body: Path, folder: Path) -> Path:
    """Write a draft with one model's tokenizer and another one's shape; its weights are random.

    Args:
        target: Whose tokenizer is taken.
        body: Whose shape is taken.
        folder: Where to.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(target), AutoConfig.from_pretrained(body)
    config.vocab_size = AutoConfig.from_pretrained(target).vocab_size
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Measure both in turns, and write the data file."""
    if answer(measure):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / "examples/models/target")
    parser.add_argument("--body", type=Path, default=ROOT / "examples/models/draft", help="the random draft's shape")
    parser.add_argument("--draft", type=Path, help="instead of a random one; with the target's tokenizer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    add_options(parser)
    options = parser.parse_args()
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        draft = options.draft or random_draft(options.target, options.body, Path(folder))
        job = {
            "target": str(options.target), "draft": str(draft), "batches": options.batches, "tokens": options.tokens,
            "engine": engine_of(options),
        }  # fmt: skip
        for repetition in range(options.repetitions):
            for name in list(METHODS)[:: 1 if repetition % 2 else -1]:
                result = run_python("benchmarks.speed.draft_step", {**job, "speculative": METHODS[name]})
                found[name] = result["conditions"]
                for batch, values in result["batches"].items():
                    rows.append({"method": name, "batch": int(batch), "repetition": repetition, **values})
                    print(f"{name}, batch {batch}: {1e6 * values['per_pass']:.0f} µs a draft pass", flush=True)
    content = {
        "provenance": provenance(),
        "departures": departures(engine_of(options)),
        "conditions": found,
        "draft": options.draft.name if options.draft else "random weights",
        "rows": rows,
    }
    write_data(options.out / "draft_step.json", content)


if __name__ == "__main__":
    main()
