"""Writes `RESULTS.md` and its pictures from the files of the benchmarks.

    python benchmarks/report.py --suite benchmarks/results/suite [--exactness exact.jsonl] [--acceptance acc.json] ...

Every measured number in it comes from a file, and every sentence with one is put together here. What a person has to
say stands in `findings.md`, which is included.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plots
from conclusions import (
    CLOCKS,
    against_peers,
    best_and_worst,
    disturbance,
    is_main,
    laws,
    loops_sentence,
    losslessness,
)
from grid import METHODS, SAME_VOCABULARY, TRANSFORMERS_METHODS
from results import Measured, compare, read
from tables import SECTIONS, table

HERE = Path(__file__).resolve().parent


def _or_dash(value: object | None) -> str:
    return "–" if value is None else str(value)


def by_method(measured: Sequence[Measured], column: Any, value: Any, name: Any) -> str:
    """A table with a row for each method and temperature, and a column for each value of something."""
    columns = sorted({column(m) for m in measured})
    rows = []
    for method in METHODS:
        for temperature in sorted({m.case.temperature for m in measured}):
            found = {column(m): m for m in measured if (m.method, m.case.temperature) == (method, temperature)}
            if found:
                cells = [_or_dash(value(found[c]) if c in found else None) for c in columns]
                rows.append((f"{method}, T = {temperature:g}", *cells))
    return table(("method", *map(name, columns)), rows)


def section_main(rows: Sequence[Measured], folder: Path) -> str:
    """Speed-up and tokens per pass by workload."""
    picture = plots.speedup_by_workload(rows, folder / "speedup_by_workload.png")
    return (
        "## Speed-up by workload\n\n"
        f"Times plain decoding's speed in the same repetition, cost ratio {rows[0].case.ratio:g}, "
        f"batch {rows[0].case.concurrency}, {rows[0].proposals} proposals. A dash: all outputs loop.\n\n"
        f"![speed-up by workload](plots/{picture.name})\n\n"
        + by_method(rows, lambda m: m.case.workload, lambda m: m.speedup(), str)
        + "\nTokens per target pass (plain decoding: 1):\n\n"
        + by_method(rows, lambda m: m.case.workload, lambda m: m.tokens_per_pass(), str)
    )


def section_axis(rows: Sequence[Measured], axis: str, title: str, label: str, folder: Path) -> str:
    """Speed-up along one axis; nothing if it has one value only."""
    if len({getattr(m.case, axis) for m in rows}) < 2:
        return ""
    picture = plots.speedup_along(rows, axis, label, folder / f"speedup_by_{axis}.png")
    return f"## {title}\n\n![{label}](plots/{picture.name})\n\n" + by_method(
        rows, lambda m: getattr(m.case, axis), lambda m: m.speedup(), lambda value: f"{value:g}"
    )


def section_proposals(rows: Sequence[Measured]) -> str:
    """Speed-up by the number of proposals; nothing if there is one only."""
    if len({m.proposals for m in rows}) < 2:
        return ""
    return "## Speed-up by number of proposals\n\n" + by_method(
        rows, lambda m: m.proposals, lambda m: m.speedup(), lambda number: f"k = {number}"
    )


def section_bound(rows: Sequence[Measured]) -> str:
    """What the passes of the models allow, and what is achieved."""
    lines = []
    for m in rows:
        if not (found := m.bound()):
            continue
        times = [f"{1e3 * found[name]:.2f}" for name in ("t", "t_verify", "s")]
        lines.append(
            (
                f"{m.method}, T = {m.case.temperature:g}, ratio {m.case.ratio:g}, batch {m.case.concurrency}",
                f"{found['L']:.2f}", *times[:2], f"{found['d']:.1f}", times[2],
                f"{found['bound']:.2f}", f"{found['achieved']:.0%}",
            )
        )  # fmt: skip
    return (
        "## What the passes alone would allow\n\n"
        "A method that makes `L` tokens in a pass of the target, which takes `t` without and `t_verify` with "
        "proposals, and `d` draft passes of `s` each, can be `L t / (t_verify + d s)` times as fast. The bound is "
        "that, summed over all steps, those that read prompts included: what all passes of plain decoding took over "
        "what all passes of the method took. `achieved` is the measured speed-up over it (milliseconds in the mean; "
        "loops included). A draft pass of vLLM's is its layers alone; of ours, its inputs and logits, too.\n\n"
        + table(("method", "L", "t", "t_verify", "d", "s", "bound", "achieved"), lines)
    )


def section_losing(measured: Sequence[Measured]) -> str:
    """Every row that is slower than plain decoding, whether or not its interval holds 1."""
    rows = sorted((s, m.label) for m in measured if (s := m.speedup()) and s.value < 1)
    text = "## Where it does not pay\n\n"
    if not rows:
        return text + "No case is slower than plain decoding.\n"
    return (
        text
        + f"All {len(rows)} cases that are slower than plain decoding, the worst first:\n\n"
        + table(("case", "speed-up"), [(label, s) for s, label in rows])
    )


def section_pictures(rows: Sequence[Measured], folder: Path) -> str:
    """Acceptance by position, and time by phase."""
    accepted = plots.acceptance_by_position(rows, folder / "acceptance_by_position.png")
    phases = plots.step_by_phase(rows, folder / "step_by_phase.png")
    return (
        f"## Acceptance by position\n\n![acceptance by position](plots/{accepted.name})\n\nLoops included.\n\n"
        f"## Where a step's time goes\n\n![time by phase](plots/{phases.name})\n"
    )


def section_other_pair(folder: Path) -> str:
    """Speed-up and tokens per pass of another pair, from a suite of its own."""
    rows = compare(read(folder), "seconds")
    case = rows[0].case
    return (
        "## Another pair: many languages\n\n"
        f"The pair and the prompts of `languages.py`; cost ratio {case.ratio:g}, batch {case.concurrency}, "
        f"{rows[0].proposals} proposals. Speed-up and tokens per target pass:\n\n"
        + by_method(rows, lambda m: "speed-up", lambda m: m.speedup(), str)
        + "\n"
        + by_method(rows, lambda m: "tokens per pass", lambda m: m.tokens_per_pass(), str)
        + "\n"
        + " ".join(losslessness(rows))
        + "\n"
    )


def section_how(files: Sequence[dict[str, Any]], measured: Sequence[Measured]) -> str:
    """How it was measured: what is not natural about it, and where everything comes from."""
    widened = {f["cell"]["ratio"]: f["widened"] for f in files if f["widened"]}
    lines = [
        "## How it was measured\n",
        "Each case is a process of its own; methods take turns, and every repetition begins with another one. "
        "Speed-ups are ratios to plain decoding of the same repetition; intervals are bootstraps over repetitions and "
        "groups of prompts, 95 %. vLLM's own methods run with the same repairs of its CPU sampler as ours.\n",
        loops_sentence(measured) + "\n",
    ]
    if widened:
        lines.append(
            "**The targets were widened.** They are one trained model, whose function was kept while its shape grew: "
            "padded widths and added layers whose output is zero (`widen.py`). Their text and their acceptance are the "
            "small model's, and only a pass costs what a larger model's does. They are no evidence of how well a draft "
            "predicts a better target.\n"
        )
        lines.append(
            table(
                ("cost ratio asked", "expected when it was made", "layers", "width", "parameters", "of which trained"),
                [
                    (f"{ratio:g}", f"{(w['chosen_by'] or {}).get('expected_ratio', float('nan')):.1f}", w["layers"],
                     w["hidden"], f"{w['parameters']:,}", f"{w['original_parameters']:,}")
                    for ratio, w in sorted(widened.items())
                ],
            )
        )  # fmt: skip
    if any(m.method in TRANSFORMERS_METHODS for m in measured):
        lines.append("Methods marked *(transformers)* are held against transformers' own plain generation.\n")
    if any(m.method == SAME_VOCABULARY for m in measured):
        lines.append(
            f"*{SAME_VOCABULARY}* is a draft of its own, trained for this comparison (`same_vocab_draft.py`).\n"
        )
    origins = [f["provenance"] for f in files]
    unique = {
        name: sorted({json.dumps(o[name]) for o in origins}) for name in ("commit", "versions", "processor", "cores")
    }
    lines += [f"- {name}: {', '.join(values)}" for name, values in unique.items()]
    lines.append(f"- measured from {min(o['time'] for o in origins)} to {max(o['time'] for o in origins)}")
    lines.append(f"- with uncommitted changes: {'yes' if any(o['modified'] for o in origins) else 'no'}")
    lines.append(f"- command: `python {' '.join(origins[-1]['argv'])}`")
    lines.append(f"- seeds: {', '.join(sorted({str(f['job']['seed']) for f in files}))} and those after them")
    hashes = {name: found["prompts"] for f in files for name, found in f["datasets"].items()}
    lines += ["", table(("workload", "sha256 of the prompts"), [(n, h[:16]) for n, h in sorted(hashes.items())])]
    return "\n".join(lines)


def suite_sections(measured: Sequence[Measured], folder: Path) -> list[str]:
    """Everything that comes from the suite, conclusions first."""
    if not measured:
        raise SystemExit("The suite's folder has no method beside plain decoding.")
    cases = [m.case for m in measured]
    # The main case is the one that most workloads were measured in.
    places = [(case.ratio, case.concurrency) for case in cases]
    ratio, concurrency = max(dict.fromkeys(places), key=places.count)
    usual = [m for m in measured if is_main(m, measured)]
    main = [m for m in usual if (m.case.ratio, m.case.concurrency) == (ratio, concurrency)]
    # The other axes were measured on one workload, which the main case has, too.
    others = [m.case.workload for m in measured if (m.case.ratio, m.case.concurrency) != (ratio, concurrency)]
    pool = others[0] if others else main[0].case.workload
    pooled = [m for m in usual if m.case.workload == pool]
    in_main = [m for m in main if m.case.workload == pool]
    sentences = (
        best_and_worst(measured) + against_peers(measured, in_main[0].case) + losslessness(measured) + laws(measured)
    )
    sentences += disturbance(measured, measured[0].clock)
    findings = HERE / "findings.md"
    return [
        "## In short\n\n" + "\n".join(f"- {sentence}" for sentence in sentences) + "\n",
        findings.read_text() if findings.exists() else "",
        section_main(main, folder),
        section_axis(
            [m for m in pooled if m.case.concurrency == concurrency],
            "ratio", "Speed-up by cost of the target", "cost of a target pass in draft passes", folder,
        ),
        section_axis(
            [m for m in pooled if m.case.ratio == ratio],
            "concurrency", "Speed-up by batch", "requests in a batch", folder,
        ),
        section_proposals([m for m in measured if m.case in {p.case for p in in_main}]),
        section_losing(measured),
        section_bound(pooled),
        section_pictures(in_main, folder),
    ]  # fmt: skip


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True, help="folder with the suite's files")
    parser.add_argument("--other-pair", type=Path, help="folder with a suite of the pair of `languages.py`")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--clock", choices=CLOCKS, default="seconds", help="cpu_seconds, where other work disturbs")
    for name, (title, _) in SECTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, help=f"file for {title!r}")
    options = parser.parse_args()
    files = read(options.suite)
    measured = compare(files, options.clock)
    parts = [
        "# Results\n\nWritten by `benchmarks/report.py` from the benchmarks' files. Numbers come from these, but for "
        "those that\n`findings.md` quotes from elsewhere, with their source.\n"
    ]
    parts += suite_sections(measured, options.out.parent / "plots")
    if options.other_pair:
        parts.append(section_other_pair(options.other_pair))
    for name, (title, reader) in SECTIONS.items():
        if path := getattr(options, name):
            parts.append(f"## {title}\n\n{reader(path)}")
    parts.append(section_how(files, measured))
    options.out.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts if part))
    print(f"{options.out}: {len(files)} cells")


if __name__ == "__main__":
    main()
