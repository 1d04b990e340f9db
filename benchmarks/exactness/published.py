"""Measures on published models that sampled output is distributed exactly as the target alone would write it.

    python -m benchmarks.exactness.published --target DIR --draft DIR --pair NAME [--number 20000]

As in `exactness.py`, but the law is that of a real target over its whole vocabulary. For each prompt and temperature,
transformers computes the law of the first token, and that of the second one after each first one that can be counted.
Pairs of tokens that are expected too rarely are pooled. The first token of an output is never proposed; the second one
is, by drafts of several tokens. A control, whose proposal probabilities are spoilt in this process, has to be caught.

The engine is compiled, computes in float32, since that is what the law is computed in, and runs in this process. It
reads each prompt once and takes it from its prefix cache after that, as vLLM does by default.
"""

import argparse
import functools
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common.grid import OURS, with_draft
from benchmarks.common.provenance import provenance, write_data
from benchmarks.common.workloads import load as load_prompts
from benchmarks.engines.conditions import ENVIRONMENT, add_pair, conditions, departures, start
from benchmarks.exactness.exactness import FAMILY_LEVEL, HEADER, NO_LEARNING, judge, observe, reduced, row_of_table
from benchmarks.exactness.goodness_of_fit import (
    LEAST_EXPECTED,
    POWER,
    TOTAL_VARIATION,
    marginals_of,
    sequences_needed,
)
from benchmarks.exactness.toy import Sampling, load, next_token_laws

# An engine reads these when vLLM is imported, which is later. `exactness` asks for one thread, for its tiny models.
os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(os.cpu_count()))

WORKLOADS = ("heldout/english_stories", "heldout/python", "heldout/russian_tinystories")
CHARACTERS = 24
PROPOSALS = 2
TOKENS = PROPOSALS + 2  # The first one is of the prompt's pass, and the last one is never proposed.
ENGINE = {"dtype": "float32", "max_num_seqs": 64, "max_model_len": 256}
CHUNK = 1024  # Outputs between two lines of progress.
CONTROL = "wrong temperature of q"


class Law:
    """The law of the first two tokens after a prompt, cell by cell.

    Attributes:
        table: `[cells of the first token, cells of the second]`; the last cell of each axis is for all other tokens,
            and for whatever follows one of them.
    """

    def __init__(self, model: Any, prompt_ids: list[int], sampling: Sampling, number: int) -> None:
        """Compute it.

        Args:
            model: The target, as transformers runs it.
            prompt_ids: The prompt.
            sampling: The law's parameters.
            number: Outputs that will be counted.
        """

        def next_laws(outputs: list[list[int]]) -> npt.NDArray[np.float64]:
            given = np.array(outputs, dtype=np.int64).reshape(len(outputs), -1)
            return next_token_laws(model, prompt_ids, given, sampling)

        (first,) = next_laws([[]])
        # What is expected less often has no second token that could be counted.
        self._first_ids = np.flatnonzero(first * number >= LEAST_EXPECTED)
        batches = np.array_split(self._first_ids[:, None], -(-len(self._first_ids) // 8))
        joint = first[self._first_ids, None] * np.concatenate([next_laws(batch.tolist()) for batch in batches])
        self._second_ids = np.flatnonzero((joint * number >= LEAST_EXPECTED).any(0))
        known = joint[:, self._second_ids]
        self.table = np.zeros((len(self._first_ids) + 1, len(self._second_ids) + 1))
        self.table[:-1, :-1] = known
        self.table[:-1, -1] = (joint.sum(1) - known.sum(1)).clip(min=0)
        self.table[-1, -1] = max(0.0, 1 - first[self._first_ids].sum())

    def cells(self, outputs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The cell of each token of some outputs, `[n, 2]`."""
        found = np.stack([_places(self._first_ids, outputs[:, 0]), _places(self._second_ids, outputs[:, 1])], 1)
        found[found[:, 0] == len(self._first_ids), 1] = len(self._second_ids)
        return found


def _places(sorted_ids: npt.NDArray[np.int64], target_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    places = np.searchsorted(sorted_ids, target_ids).clip(max=len(sorted_ids) - 1)
    return np.where(sorted_ids[places] == target_ids, places, len(sorted_ids))


def write(llm: Any, prompt_ids: list[int], temperature: float, number: int) -> npt.NDArray[np.int64]:
    """The first two tokens of so many outputs, `[number, 2]`."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=temperature, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = np.empty((number, 2), dtype=np.int64)
    for first in range(0, number, CHUNK):
        size = min(CHUNK, number - first)
        finished = llm.generate([{"prompt_token_ids": prompt_ids}] * size, wanted, use_tqdm=False)
        outputs[first : first + size] = [output.outputs[0].token_ids[:2] for output in finished]
        print(f"  {first + size:,} of {number:,} outputs", flush=True)
    return outputs


def main() -> None:
    """Measure, and write the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair(parser, "exactness_published")
    parser.add_argument("--number", type=int, default=20_000, help="outputs for each prompt and temperature")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, help="one prompt of each; see workloads.py")
    parser.add_argument("--seed", type=int, default=0, help="of the engines")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(options.target), load(options.target)
    cases = []
    for workload in options.workloads:
        (prompt,) = load_prompts(workload, 1, CHARACTERS)["prompts"]
        prompt_ids = tokenizer.encode(prompt)
        for temperature in options.temperatures:
            law = Law(model, prompt_ids, Sampling(temperature=temperature), options.number)
            cases.append((f"{workload.partition('/')[2]}, T = {temperature:g}", prompt_ids, temperature, law))
    del model
    level = FAMILY_LEVEL / ((len(cases) + 1) * len(marginals_of(cases[0][3].table)))
    print(f"level of each test: {level:.1e}\n{HEADER}")
    entries, ran = [], {}

    for settings, chosen, spoiler in (({}, cases, ""), (NO_LEARNING, cases[-1:], "temperature")):
        # How much pays on this machine is another question.
        speculative = with_draft(OURS, PROPOSALS, options.draft, adaptive_length=False, **settings)
        # Each prompt comes thousands of times, and is read once.
        llm = start(str(options.target), speculative, {**ENGINE, "enable_prefix_caching": True}, options.seed)
        ran = conditions(llm)
        for name, prompt_ids, temperature, law in chosen:
            outputs, counted = observe(
                llm, spoiler, functools.partial(write, llm, prompt_ids, temperature, options.number)
            )
            entry = {
                "setting": f"control: {CONTROL}, {name}" if spoiler else name,
                "exact": not spoiler,
                "sequences": options.number,
                "sequences_needed": sequences_needed(law.table, level),
                **counted,
                "sampling": {**vars(Sampling()), "temperature": temperature},
                **judge(law.table, law.cells(outputs), level, valid=counted["accepted"] > 0, exact=not spoiler),
            }
            entries.append(entry)
            print(row_of_table(entry), flush=True)
        del llm
    content = {
        "provenance": provenance(),
        "pair": options.pair,
        "conditions": {OURS: ran},
        "departures": [*departures(ENGINE), "in one process", "always as many proposals as there can be"],
        "levels": {"family_level": FAMILY_LEVEL, "total_variation": TOTAL_VARIATION, "power": POWER},
        "rows": [reduced(entry) for entry in entries],
        "others": [],
    }
    write_data(options.out / f"{options.name}.json", content)
    raise SystemExit(1 if not all(entry["as_it_should_be"] for entry in entries) else 0)


if __name__ == "__main__":
    main()
