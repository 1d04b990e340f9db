"""Measures speed over a grid: cost of the target, method, proposals, batch, temperature, workload.

    python -m benchmarks.speed.suite --grid tiny|short|default [--name speed]

Every cell is a process of its own and a file of its own in a folder that is not committed. Cells whose file exists are
skipped, so that a run that was interrupted goes on where it was (`--fresh` begins anew). At the end they are reduced to
`benchmarks/data/NAME.json`, which the report is written from. Targets with another cost ratio are made by `widen.py`.
Greedy output is compared with plain decoding's: in float32 a difference makes the run fail; in smaller types, a pass of
several tokens may round two nearly equal logits otherwise than a pass of one, and differences are counted.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import workloads
from benchmarks.common.grid import GRIDS, METHODS, TRANSFORMERS_METHODS, Cell, Grid, baseline, with_draft
from benchmarks.common.provenance import RAW, provenance, write_data
from benchmarks.common.reduce import reduced
from benchmarks.engines.conditions import add_options, add_pair, departures, engine_of, run_python
from benchmarks.speed.likelihood import log_likelihoods
from benchmarks.speed.pass_times import shape_for_ratio
from benchmarks.speed.widen import widen_folder

SEEDS = 10_000  # Between repetitions, so that no two requests of a cell share one.


def target_of(ratio: float, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The target with a cost ratio, made if it is not there, and what is known of it."""
    if ratio == 0:
        return options.target, {}
    folder = options.models / f"{options.target.name}-ratio-{ratio:g}"
    if not (folder / "widened.json").exists():
        print(f"making a target whose pass costs {ratio:g} draft passes", flush=True)
        hidden, layers, reason = shape_for_ratio(options.target, options.draft, ratio, engine_of(options))
        widen_folder(options.target, folder, hidden, layers, reason)
    found = json.loads((folder / "widened.json").read_text())
    return folder, {name: value for name, value in found.items() if name != "provenance"}


@functools.cache
def _tokenizer(target: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(target)


def asked(target: Path, prompt: str) -> str:
    """A prompt as a user's message, in the target's chat template."""
    message = [{"role": "user", "content": prompt}]
    text: str = _tokenizer(target).apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return text


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
    cases, datasets = [], {}
    for concurrency, name in grid.cases_of(cell):
        found = workloads.load(name, grid.groups * concurrency, grid.characters)
        # Whole groups only.
        prompts = found["prompts"][: len(found["prompts"]) // concurrency * concurrency]
        if options.chat:
            prompts = [asked(target, prompt) for prompt in prompts]
        if not prompts:
            raise RuntimeError(f"{name} has {len(found['prompts'])} prompts; a batch needs {concurrency}.")
        cases.append({"workload": name, "concurrency": concurrency, "prompts": prompts})
        datasets[f"{name}, batch {concurrency}"] = found["sha256"]["prompts"]
    job: dict[str, Any] = {
        "target": str(target),
        "engine": engine_of(options),
        "temperatures": grid.temperatures,
        "cases": cases,
        "tokens": grid.tokens,
        "seed": cell.repetition * SEEDS,
        # With one, the draft's length could not follow what passes cost.
        "seeded": False,
    }
    if cell.method in TRANSFORMERS_METHODS:
        module = "benchmarks.engines.measure_transformers"
        plain = cell.method == baseline(cell.method)
        job.update(draft=None if plain else str(options.draft), proposals=cell.proposals)
    else:
        module = "benchmarks.engines.measure_vllm"
        job["speculative"] = with_draft(cell.method, cell.proposals, options.draft, options.trained)
    result = run_python(module, job)
    given = {(case["workload"], case["concurrency"]): case["prompts"] for case in cases}
    for row in result["rows"]:
        if row["temperature"]:
            written = [ids for group in row["groups"] for ids in group["target_ids"]]
            prompts = given[row["workload"], row["concurrency"]]
            row["log_likelihoods"] = log_likelihoods(options.target, prompts, written, row["temperature"])
    about = {"cell": dataclasses.asdict(cell), "commit": provenance()["commit"], "seed": job["seed"]}
    return {**about, "datasets": datasets, "widened": widened, **result}


def run(grid: Grid, options: argparse.Namespace, folder: Path) -> list[str]:
    """Measure every cell that has no file yet.

    Args:
        grid: What to measure.
        options: Where models are.
        folder: Where files go.

    Returns:
        A sentence for everything that went wrong.
    """
    cells, failures = grid.cells(), []
    for number, cell in enumerate(cells, 1):
        path = folder / f"{cell.name}.json"
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
    return failures


def parsed() -> tuple[Grid, argparse.Namespace]:
    """The grid and the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="default")
    add_pair(parser, "speed")
    parser.add_argument("--raw", type=Path, default=RAW, help="folder for the cells' folder")
    parser.add_argument("--fresh", action="store_true", help="forget cells of an earlier run")
    parser.add_argument("--chat", action="store_true", help="prompts are messages, in the target's chat template")
    parser.add_argument("--trained", type=Path, help="folder with what examples/references/ has trained for the target")
    parser.add_argument("--models", type=Path, default=RAW / "models", help="for widened targets")
    add_options(parser)
    changes = parser.add_argument_group("instead of the preset's")
    changes.add_argument("--ratios", type=float, nargs="+", help="0: the target as it is; the first on all workloads")
    changes.add_argument("--methods", nargs="+", choices=METHODS)
    changes.add_argument("--proposals", type=int, nargs="+")
    changes.add_argument("--concurrencies", type=int, nargs="+")
    changes.add_argument("--temperatures", type=float, nargs="+")
    changes.add_argument("--workloads", nargs="+")
    changes.add_argument("--side-workloads", nargs="+")
    for name in ("repetitions", "groups", "tokens", "characters"):
        changes.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    given: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value := getattr(options, field.name), list) else value
        for field in dataclasses.fields(Grid)
        if getattr(options, field.name) is not None
    }
    if "workloads" in given and "side_workloads" not in given:
        given["side_workloads"] = given["workloads"][:1]
    return dataclasses.replace(GRIDS[options.grid], **given), options


def main() -> None:
    """Run the grid."""
    grid, options = parsed()
    folder = options.raw / options.name
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    failures = run(grid, options, folder)
    names = [folder / f"{cell.name}.json" for cell in grid.cells()]
    files = [json.loads(path.read_text()) for path in names if path.exists()]
    if files:
        content = {
            "provenance": provenance(),
            "departures": departures(engine_of(options)),
            "pair": options.pair,
            "settings": dataclasses.asdict(grid),
            **reduced(files),
        }
        write_data(options.out / f"{options.name}.json", content)
        if (engine_of(options).get("dtype")) == "float32":
            failures += [f"not lossless: {row['method']}" for row in content["rows"] if row.get("different")]
    if failures:
        sys.exit("\n".join(["NOT AS IT SHOULD BE:", *failures]))


if __name__ == "__main__":
    main()
