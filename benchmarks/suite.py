"""Measures speed and acceptance over a grid: pair and cost ratio, method, proposals, temperature, batch, workload.

    python benchmarks/suite.py --grid quick|default|full [--out DIR]
    python benchmarks/report.py --suite DIR

Every cell is a process of its own and a JSON file of its own, with what is needed to judge or repeat it. Cells whose
file exists are skipped, so that a run that was interrupted goes on where it was. Targets with another cost ratio are
made by `widen.py` beside the results. Greedy output has to be plain decoding's: differences are reported at once, noted
in the files, and make the run fail.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import lossless
import workloads
from grid import (
    GRIDS,
    METHODS,
    SAME_VOCABULARY,
    TRANSFORMERS_METHODS,
    Cell,
    Grid,
    baseline,
    with_draft,
)
from likelihood import log_likelihoods
from pass_times import run_python, shape_for_ratio
from provenance import provenance
from widen import widen_folder

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 10_000  # Between repetitions, so that no two requests of a cell share one.


def target_of(ratio: float, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The target with a cost ratio, made if it is not there, and what is known of it."""
    if ratio == 0:
        return options.target, {}
    folder = options.models / f"{options.target.name}-ratio-{ratio:g}"
    if not (folder / "widened.json").exists():
        print(f"making a target whose pass costs {ratio:g} draft passes", flush=True)
        hidden, layers, reason = shape_for_ratio(options.target, options.draft, ratio)
        widen_folder(options.target, folder, hidden, layers, reason)
    return folder, json.loads((folder / "widened.json").read_text())


def measure(cell: Cell, grid: Grid, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one cell.

    Args:
        cell: The cell.
        grid: What it belongs to.
        options: Where the models are.

    Returns:
        What its file holds.
    """
    target, widened = target_of(cell.ratio, options)
    wanted = grid.groups * cell.concurrency
    loaded = {name: workloads.load(name, wanted, grid.characters) for name in grid.workloads_of(cell)}
    prompts = {}
    for name, found in loaded.items():
        # Whole groups only.
        prompts[name] = found["prompts"][: len(found["prompts"]) // cell.concurrency * cell.concurrency]
        if not prompts[name]:
            raise RuntimeError(f"{name} has {len(found['prompts'])} prompts; a batch needs {cell.concurrency}.")
    job: dict[str, Any] = {
        "target": str(target),
        "concurrency": cell.concurrency,
        "temperatures": grid.temperatures,
        "workloads": prompts,
        "tokens": grid.tokens,
        "seed": cell.repetition * SEEDS,
    }
    if cell.method in TRANSFORMERS_METHODS:
        script = "measure_transformers.py"
        plain = cell.method == baseline(cell.method)
        job.update(draft=None if plain else str(options.draft), proposals=cell.proposals)
    else:
        script = "measure_vllm.py"
        job["speculative"] = with_draft(cell.method, cell.proposals, options.draft, options.same_vocabulary_draft)
    began = time.perf_counter()
    result = run_python(script, job)
    process_seconds = time.perf_counter() - began
    for row in result["rows"]:
        if row["temperature"]:
            written = [ids for group in row["groups"] for ids in group["target_ids"]]
            given = prompts[row["workload"]]
            row["log_likelihoods"] = log_likelihoods(options.target, given, written, row["temperature"])
    del job["workloads"]
    return {
        "cell": dataclasses.asdict(cell),
        "job": job,
        "characters": grid.characters,
        "datasets": {name: found["sha256"] for name, found in loaded.items()},
        "widened": widened,
        "provenance": provenance(),
        "process_seconds": process_seconds,
        **result,
    }


def run(grid: Grid, options: argparse.Namespace) -> list[str]:
    """Measure every cell that has no file yet.

    Args:
        grid: What to measure.
        options: Where models are, and files go.

    Returns:
        A sentence for everything that went wrong.
    """
    cells, failures = grid.cells(), []
    for number, cell in enumerate(cells, 1):
        path = options.out / f"{cell.name}.json"
        if path.exists():
            continue
        began = time.perf_counter()
        try:
            result = measure(cell, grid, options)
        except RuntimeError as error:
            failures.append(f"{cell.name}: {error}")
            print(f"FAILED {failures[-1]}", flush=True)
            continue
        # Under its own name only once it is whole.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(path)
        print(f"{number}/{len(cells)} {cell.name}: {time.perf_counter() - began:.0f} s", flush=True)
        for sentence in lossless.check(options.out):
            print(f"NOT LOSSLESS {sentence}", flush=True)
    return failures + lossless.check(options.out)


def parsed() -> tuple[Grid, argparse.Namespace]:
    """The grid and the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/suite")
    parser.add_argument("--models", type=Path, default=ROOT / "benchmarks/results/models", help="for widened targets")
    parser.add_argument("--target", type=Path, default=ROOT / "examples/models/target")
    parser.add_argument("--draft", type=Path, default=ROOT / "examples/models/draft")
    parser.add_argument("--same-vocabulary-draft", type=Path, help="from same_vocab_draft.py; without it, left out")
    changes = parser.add_argument_group("instead of the preset's")
    changes.add_argument("--ratios", type=float, nargs="+", help="the first one on all workloads")
    changes.add_argument("--methods", nargs="+", choices=METHODS)
    changes.add_argument("--proposals", type=int, nargs="+")
    changes.add_argument("--concurrencies", type=int, nargs="+")
    changes.add_argument("--temperatures", type=float, nargs="+")
    changes.add_argument("--workloads", nargs="+")
    changes.add_argument("--side-workloads", nargs="+")
    for name in ("repetitions", "groups", "tokens", "characters"):
        changes.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    given = {
        field.name: tuple(value) if isinstance(value := getattr(options, field.name), list) else value
        for field in dataclasses.fields(Grid)
        if getattr(options, field.name) is not None
    }
    if "workloads" in given and "side_workloads" not in given:
        given["side_workloads"] = given["workloads"][:1]
    grid = dataclasses.replace(GRIDS[options.grid], **given)
    if options.same_vocabulary_draft is None and SAME_VOCABULARY in grid.methods:
        print(f"without --same-vocabulary-draft, {SAME_VOCABULARY!r} is left out")
        grid = dataclasses.replace(grid, methods=tuple(m for m in grid.methods if m != SAME_VOCABULARY))
    return grid, options


def main() -> None:
    """Run the grid."""
    grid, options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if failures := run(grid, options):
        sys.exit("\n".join(["NOT AS IT SHOULD BE:", *failures]))


if __name__ == "__main__":
    main()
