"""Measures that sampled output with speculation is distributed exactly as the target alone would write it.

    python -m benchmarks.exactness.exactness [--quick] [--settings REGEX]

For each setting a vLLM engine writes many outputs of the same prompt with a toy pair (`toy.py`), and the
counts of the first tokens, alone and jointly, are held against the target's law, enumerated cell by cell
without vLLM (Pearson's chi-square; cells in which fewer than 5 are expected are pooled). The first token of
an output is never proposed, so what is at stake begins with the second.

**Level.** All tests of all settings together raise a false alarm with probability `FAMILY_LEVEL` at most
(Bonferroni).

**Sample size.** Enough to see, in every single token and every pair of neighbours, an error of
`TOTAL_VARIATION` in total variation with probability `POWER` at that level, whatever the error looks like:
among all errors of one total variation, the one that chi-square sees worst changes every cell by the same
ratio, up or down (Cauchy-Schwarz), and that one is assumed.

**Learning.** The draft learns from every output, so each is drafted with another distribution than the one before it.
The outputs are independent of each other all the same, since each has the target's law whatever was learned.

**Controls.** What is known to be wrong has to be caught by the same tests, with a draft that stays as it is: the
published transfer, and proposal probabilities spoilt in this process, once in all rows, and once each in the rows that
are computed another way.

The engines compute in float32, since that is what the law is enumerated in, with one thread, since the models are tiny;
they are compiled, as a user's are, unless `--enforce-eager` says otherwise.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.common.provenance import DATA, RAW, provenance, write_data
from benchmarks.exactness.goodness_of_fit import MARGINALS, POWER, TOTAL_VARIATION, goodness_of_fit, sequences_needed
from benchmarks.exactness.hooks import rows_counted, spoilt
from benchmarks.exactness.same_vocabulary import compare_acceptance, print_acceptance
from benchmarks.exactness.toy import Pair, Sampling, cells, exact_law, load, make_pairs, next_token_laws, prompt_ids
from benchmarks.exactness.toy_engine import MAX_TOKENS, engine, parameters, spec_counters, write

Written = TypeVar("Written")

FAMILY_LEVEL = 0.01
DEPTH = 4  # Tokens whose law is enumerated.
QUICK_SEQUENCES = 20_000
CONTROL_SEQUENCES = 100_000
ACCEPTANCE_SEQUENCES = 100_000


@dataclass(frozen=True)
class Setting:
    """One way to run an engine.

    Attributes:
        name: Unique.
        pair: Name of a toy pair.
        speculation: Our settings; `None` for plain decoding.
        samplings: Requests take turns with these, in one batch.
        seeded: Whether each request has a seed of its own.
        spoil: A key of `SPOILERS`.
        exact: Whether its output has the target's law; `False` for a control.
    """

    name: str
    pair: str = "full"
    speculation: Mapping[str, Any] | None = field(default_factory=dict)
    samplings: tuple[Sampling, ...] = (Sampling(),)
    seeded: bool = False
    spoil: str = ""
    exact: bool = True


NO_LEARNING: dict[str, Any] = {"online_learning": False}
ONE_BY_ONE = {"rejection_sample_method": "standard"}
PAPER = {"strategy": "tokentiming-paper", "allow_inexact": True}
MIXED = (Sampling(temperature=0), Sampling(temperature=0.5), Sampling(temperature=1.3, top_k=6))
PENALTIES = Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3)
SETTINGS = (
    Setting("plain decoding", speculation=None),
    Setting("tokentiming"),
    Setting("temperature 0.5", samplings=(Sampling(temperature=0.5),)),
    Setting("temperature 0.7", samplings=(Sampling(temperature=0.7),)),
    Setting("temperature 1.3", samplings=(Sampling(temperature=1.3),)),
    Setting("top-k", samplings=(Sampling(top_k=5),)),
    Setting("top-p", samplings=(Sampling(top_p=0.8),)),
    Setting("penalties", samplings=(PENALTIES,)),
    Setting("mixed batch", samplings=MIXED),
    Setting("seeded requests, adaptive length", speculation={"adaptive_length": True}, seeded=True),
    Setting("no learning", speculation=NO_LEARNING),
    Setting("few draft tokens", speculation={"max_draft_tokens": 2}),
    Setting("verified one by one", speculation=ONE_BY_ONE),
    Setting("verification that fails", spoil="failing verification"),
    Setting("lossy vocabularies", pair="small"),
    Setting("same vocabulary", pair="same"),
    Setting("tli", speculation={"strategy": "tli"}),
    Setting("slem", speculation={"strategy": "slem"}),
    Setting("control: tokentiming-paper", speculation=PAPER, exact=False),
    Setting("control: wrong temperature", speculation=NO_LEARNING, spoil="temperature", exact=False),
    Setting("control: wrong later rows", speculation=NO_LEARNING, spoil="later", exact=False),
    Setting("control: wrong pending rows", speculation=NO_LEARNING, spoil="pending", exact=False),
    Setting("control: wrong stages", speculation=NO_LEARNING, spoil="stages", exact=False),
    Setting("control: wrong acceptance of blocks", speculation=NO_LEARNING, spoil="acceptance", exact=False),
)
QUICK = (
    "plain decoding",
    "tokentiming",
    "mixed batch",
    "no learning",
    "tli",
    "slem",
    "control: wrong temperature",
)


def observe(llm: Any, spoil: str, write_outputs: Callable[[], Written]) -> tuple[Written, dict[str, Any]]:
    """Let an engine write, and count what its drafts did meanwhile.

    Args:
        llm: The engine.
        spoil: A key of `SPOILERS`, or empty.
        write_outputs: Lets it write.

    Returns:
        What was written, and the part of an entry that tells how.
    """
    before, began = spec_counters(llm), time.monotonic()
    with rows_counted() as rows, spoilt(spoil):
        written = write_outputs()
    seconds, counted = time.monotonic() - began, spec_counters(llm)
    counted.subtract(before)
    return written, {
        "seconds": seconds,
        "proposed": counted["draft_tokens"],
        "accepted": counted["accepted_tokens"],
        # Every pass of the target writes one token of its own, and what it accepts.
        "tokens_per_pass": 1 + counted["accepted_tokens"] / max(1, counted["drafts"]),
        "rows": dict(rows),
    }


def judge(
    law: npt.NDArray[np.float64], found: npt.NDArray[np.int64], level: float, *, valid: bool, exact: bool
) -> dict[str, Any]:
    """Hold outputs against a law.

    Args:
        law: An axis of cells for each token.
        found: `[n, tokens]`, the cells of the outputs.
        level: Of each test.
        valid: Whether anything was at stake.
        exact: Whether the outputs have to have that law.

    Returns:
        The part of an entry that tells the verdict.
    """
    tests = goodness_of_fit(law, found, level)
    least = min(test["p"] for test in tests)
    passed = least >= level
    return {
        "least_p": least,
        "largest_tv_excess": max(test["tv"] - test["tv_expected"] for test in tests),
        "passed": passed,
        "as_it_should_be": valid and passed == exact,
        "tests": tests,
    }


def measure(
    llm: Any, setting: Setting, pair: Pair, level: float, number: int = 0, tokens: int = MAX_TOKENS
) -> list[dict[str, Any]]:
    """Measure one setting with a running engine.

    Args:
        llm: The engine.
        setting: One that this engine fits.
        pair: The setting's.
        level: Of each test.
        number: Outputs of each sampling; 0 for as many as are needed, or `CONTROL_SEQUENCES` for a control.
        tokens: Of each output.

    Returns:
        One entry for each sampling.
    """
    # The last token of an output is never proposed.
    prompt, depth = prompt_ids(pair), min(DEPTH, tokens - 1)
    laws = [exact_law(pair, prompt, depth, sampling) for sampling in setting.samplings]
    needed = max(sequences_needed(law, level) for law in laws)
    number = number or (needed if setting.exact else CONTROL_SEQUENCES)
    written, counted = observe(
        llm, setting.spoil, lambda: write(llm, setting.samplings, prompt, number, setting.seeded, tokens)
    )
    valid = setting.speculation is None or counted["accepted"] > 0
    common = {
        "setting": setting.name,
        "exact": setting.exact,
        "pair": setting.pair,
        "speculation": setting.speculation,
        "sequences": number,
        "sequences_needed": needed,
        "level": level,
        **counted,
    }
    return [
        {
            **common,
            "sampling": dataclasses.asdict(sampling),
            **judge(law, cells(pair, outputs[:, :depth]), level, valid=valid, exact=setting.exact),
        }
        for sampling, law, outputs in zip(setting.samplings, laws, written, strict=True)
    ]


def law_against_vllm(pair: Pair, samplings: Sequence[Sampling]) -> float:
    """The largest difference between a probability of ours and vLLM's own, without speculation."""
    model, prompt, largest = load(pair.target), prompt_ids(pair), 0.0
    with engine(pair, None, seed=0, logprobs_mode="processed_logprobs") as llm:
        for sampling in (s for s in samplings if s.temperature):  # What a greedy request reports is not its law.
            wanted = parameters(sampling, logprobs=min(20, model.config.vocab_size))
            for output in llm.generate([{"prompt_token_ids": prompt}] * 16, wanted, use_tqdm=False):
                ids = np.array(output.outputs[0].token_ids)
                for position, reported in enumerate(output.outputs[0].logprobs):
                    law = next_token_laws(model, prompt, ids[None, :position], sampling)[0]
                    pairs = [(law[i], math.exp(entry.logprob)) for i, entry in reported.items()]
                    largest = max([largest, *(abs(ours - theirs) for ours, theirs in pairs)])
    return largest


def refusal(llm: Any, prompt: list[int], **arguments: Any) -> str:
    """What vLLM says to a sampling parameter together with speculation; empty if it takes it."""
    from vllm.exceptions import VLLMValidationError

    try:
        llm.generate([{"prompt_token_ids": prompt}], parameters(Sampling(), **arguments), use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return ""


def level_of(settings: Sequence[Setting]) -> float:
    """The level of each test, so that all tests of all settings keep `FAMILY_LEVEL`."""
    return FAMILY_LEVEL / sum(len(setting.samplings) * len(MARGINALS) for setting in settings)


def by_engine(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings, together with those that the same engine fits."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(json.dumps([setting.pair, setting.speculation], sort_keys=True), []).append(setting)
    return list(groups.values())


HEADER = (
    f"{'setting':<50}{'N':>9}{'tokens/pass':>12}{'accepted':>9}{'least p':>10}{'TV':>8}{'expected':>9}{'seen':>7}  rows"
)


def row_of_table(entry: Mapping[str, Any]) -> str:
    """One line for a reader: of the tests, the one with the least p."""
    worst = min(entry["tests"], key=lambda test: test["p"])
    usual = dataclasses.asdict(Sampling())
    changed = {name: value for name, value in entry["sampling"].items() if value != usual[name]}
    share = entry["accepted"] / entry["proposed"] if entry["proposed"] else 0
    rows = " ".join(f"{name}={count}" for name, count in entry["rows"].items())
    verdict = "" if entry["as_it_should_be"] else "  <-- NOT AS IT SHOULD BE"
    label = " ".join([entry["setting"], *(f"{name}={value:g}" for name, value in changed.items())])
    return (
        f"{label:<50}{entry['sequences']:>9}{entry['tokens_per_pass']:>12.3f}{share:>9.3f}"
        f"{entry['least_p']:>10.2g}{worst['tv']:>8.4f}{worst['tv_expected']:>9.4f}{worst['tv_seen']:>7.4f}"
        f"  {rows}{verdict}"
    )


def reduced(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the report needs of a measurement: its worst test, and whether that is as it should be."""
    worst = min(entry["tests"], key=lambda test: test["p"])
    kept = ("setting", "exact", "sequences", "sequences_needed", "tokens_per_pass", "least_p", "passed")
    return {
        **{name: entry[name] for name in kept},
        "as_it_should_be": entry["as_it_should_be"],
        "temperature": entry["sampling"]["temperature"],
        **{name: worst[name] for name in ("tv", "tv_expected", "tv_seen")},
    }


def run(
    pairs: Mapping[str, Pair],
    chosen: Sequence[Setting],
    number: int,
    tokens: int,
    seed: int,
    report: Any,
    **arguments: Any,
) -> int:
    """Measure settings.

    Args:
        pairs: From `make_pairs`.
        chosen: What to measure.
        number: Outputs of each sampling; 0 for as many as are needed.
        tokens: Of each output.
        seed: Of the first engine.
        report: Called with each entry.
        arguments: Of every engine that is measured.

    Returns:
        How many are not as they should be.
    """
    samplings = sorted({sampling for s in chosen for sampling in s.samplings}, key=repr)
    differences = {name: law_against_vllm(pairs[name], samplings) for name in sorted({s.pair for s in chosen})}
    with engine(pairs["full"], {}, seed) as llm:
        prompt = prompt_ids(pairs["full"])
        refused = {
            "min_p": refusal(llm, prompt, min_p=0.1),
            "logit_bias": refusal(llm, prompt, logit_bias={2: 1.0}),
        }
    report({"law_against_vllm": differences, "refused_with_speculation": refused})
    level, failures = level_of(SETTINGS), 0
    print(f"largest difference between the enumerated law and vLLM's own: {max(differences.values()):.1e}")
    print(f"level of each test: {level:.1e}\n{HEADER}")
    for engine_seed, alike in enumerate(by_engine(chosen), seed):
        pair = pairs[alike[0].pair]
        with engine(pair, alike[0].speculation, engine_seed, **arguments) as llm:
            for setting in alike:
                for entry in measure(llm, setting, pair, level, number, tokens):
                    report({**entry, "engine_seed": engine_seed})
                    print(row_of_table(entry), flush=True)
                    failures += not entry["as_it_should_be"]
    if any(s.name == "same vocabulary" for s in chosen):
        acceptance = compare_acceptance(pairs["same"], number or ACCEPTANCE_SEQUENCES, seed + len(SETTINGS))
        report(acceptance)
        print_acceptance(acceptance)
        failures += not acceptance["as_it_should_be"]
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    parser.add_argument("--raw", type=Path, default=RAW / "exactness.jsonl", help="every test, as JSON lines")
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation")
    parser.add_argument("--quick", action="store_true", help="fewer settings and outputs than the power asks for")
    parser.add_argument("--settings", default="", help="only those whose name this regular expression is found in")
    parser.add_argument("--number", type=int, default=0, help="outputs of each sampling, instead of as many as needed")
    parser.add_argument(
        "--tokens", type=int, default=MAX_TOKENS, help="of each output, at least 3; the first ones are tested"
    )
    parser.add_argument("--name", default="exactness", help="of the data file")
    parser.add_argument("--seed", type=int, default=0, help="engines take this seed and those after it")
    options = parser.parse_args()
    chosen = [s for s in SETTINGS if re.search(options.settings, s.name) and (not options.quick or s.name in QUICK)]
    entries: list[Mapping[str, Any]] = []
    options.raw.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, options.raw.open("w") as file:

        def report(entry: Mapping[str, Any]) -> None:
            entries.append(entry)
            print(json.dumps(entry), file=file, flush=True)

        number = options.number or (QUICK_SEQUENCES if options.quick else 0)
        eager = options.enforce_eager
        failures = run(
            make_pairs(Path(folder)), chosen, number, options.tokens, options.seed, report, enforce_eager=eager
        )
    interpreted = ["runner V2's kernels under Triton's interpreter"] * bool(os.environ.get("TRITON_INTERPRET"))
    content = {
        "provenance": provenance(),
        "departures": [
            *interpreted,
            "computed in float32, as the law is enumerated",
            "one thread",
            *["not compiled"] * eager,
        ],
        "levels": {"family_level": FAMILY_LEVEL, "total_variation": TOTAL_VARIATION, "power": POWER},
        "rows": [reduced(entry) for entry in entries if "setting" in entry],
        "others": [{k: v for k, v in entry.items() if k != "tests"} for entry in entries if "setting" not in entry],
    }
    write_data(options.out / f"{options.name}.json", content)
    sys.exit(f"{failures} not as it should be" if failures else 0)


if __name__ == "__main__":
    main()
