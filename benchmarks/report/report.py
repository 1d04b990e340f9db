"""Writes the reports from the benchmarks' data, or checks that they are what it would write.

    python -m benchmarks.report.report            # the four reports, a part of README.md, pictures
    python -m benchmarks.report.report --check    # exits with 1 and prints the lines that differ

Every measured number in a report comes from a file in `benchmarks/data/`, which its program wrote. What a person has to
say stands in `findings.md`; a finding may name values (`{{like this}}`, see `values.py`), and is left out where
the data has none of that name. A section whose file is missing is left out, and a report without any is not there.
Pictures are not compared: the same data makes other bytes with other fonts. They have to exist and to be referred to.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import ROOT
from benchmarks.report import tables
from benchmarks.report.languages import languages
from benchmarks.report.learning import learning
from benchmarks.report.pairs import pairs
from benchmarks.report.soak import soak
from benchmarks.report.speed import Suite, in_short, other_speed, speed, varies
from benchmarks.report.values import values_of

FINDINGS = ROOT / "benchmarks" / "findings.md"
README = "README.md"
README_ACCEPTANCE, README_PICTURE = "acceptance_published", "tokens_per_pass.png"
BEGIN, END = "<!-- written by benchmarks/report/ -->\n", "<!-- end of what it writes -->\n"
REPORTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "benchmarks/LANGUAGES.md": ("languages", languages),
    "benchmarks/PAIRS.md": ("pairs", pairs),
    "benchmarks/SOAK.md": ("soak", soak),
}
# After the speeds.
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "learning": ("What the draft learns while it serves", learning),
    "accelerator": ("On an accelerator", tables.accelerator),
    "startup": ("What our part of a start takes", tables.startup),
    "serving": ("Under a serving load", tables.serving),
    "draft_step": ("A draft step beside vLLM's", tables.draft_step),
    "overhead": ("What the plugin costs the host, without models", tables.overhead),
    "overhead_batch": ("The same for several requests in a step", tables.overhead),
    "scaling": ("How that grows with requests, context, proposals and vocabulary", tables.scaling),
    "kernels": ("The alignment kernels beside other libraries", tables.kernels),
    "exactness": ("Exactness of sampled output", tables.exactness),
    "exactness_v2": ("Exactness of sampled output on model runner V2", tables.exactness),
}
LINKS = {
    "benchmarks/RESULTS.md": "speeds, exactness, and where it loses",
    "benchmarks/LANGUAGES.md": "what is won in each of twelve languages",
    "benchmarks/PAIRS.md": "what every two of eight well-known tokenizers make of each other in twelve languages",
    "benchmarks/SOAK.md": "what became of thousands of requests of all kinds to one server, malicious ones too",
}

Data = dict[str, dict[str, Any]]


def read(folder: Path) -> Data:
    """The data files of a folder, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def findings(text: str, values: dict[str, str]) -> str:
    """What a person says, with values from the data; items that name a value that is not there are left out."""
    head, *items = re.split(r"^(?=- )", text, flags=re.M)
    kept = [item for item in items if all(name in values for name in re.findall(r"{{(.+?)}}", item))]
    return head + "".join(re.sub(r"{{(.+?)}}", lambda found: values[found[1]], item) for item in kept)


def results(data: Data) -> str:
    """`RESULTS.md`."""
    suite = Suite(data["speed"]) if "speed" in data else None
    parts = [
        "# Results\n\nWritten by `benchmarks/report/` from `benchmarks/data/`. Every number comes from there.\n",
    ]

    def add(title: str, text: str) -> None:
        parts.append(f"## {title}\n\n{text}")

    if "acceptance_published" in data:
        found = data["acceptance_published"]
        add(f"A published pair: {found['pair']}", tables.acceptance(found))
    if "exactness_published" in data:
        add("A published pair: exactness of sampled output", tables.exactness(data["exactness_published"]))
    if "speed_published" in data:
        add("A published pair: speed", other_speed(Suite(data["speed_published"])))
    if "speed_references" in data:
        add("Beside what needs training", other_speed(Suite(data["speed_references"])))
    if suite:
        add("In short", in_short(suite))
    parts.append(findings(FINDINGS.read_text(encoding="utf-8"), values_of(data)))
    if "acceptance" in data:
        found = data["acceptance"]
        add(f"Tokens per target pass: {found['pair']}", tables.acceptance(found))
    if "greedy" in data:
        add("Greedy output is plain decoding's", tables.greedy(data["greedy"]))
    for name in ("repeatability_published", "repeatability"):
        if name in data:
            add(f"What repeats itself: {data[name]['pair']}", tables.repeatability(data[name]))
    if suite:
        add("Speed-up", speed(suite))
    if "speed_languages" in data:
        add("Speed-up of a pair of many languages", other_speed(Suite(data["speed_languages"])))
    for name, (title, section) in SECTIONS.items():
        if name in data:
            add(title, section(data[name]))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def readme_part(data: Data) -> str:
    """What stands between the two marks in `README.md`: tokens per pass, what repeats itself, links to the reports."""
    lines = []
    if accepted := [name for name in (README_ACCEPTANCE, "acceptance") if name in data]:
        found = data[accepted[0]]
        settings, made, shown = found["settings"], found["provenance"], tables.Accepted(found)
        lines.append(
            f"Tokens per target pass, {found['pair']}: "
            f"{settings['num_prompts'] * len(settings['workloads'])} held-out prompts, "
            f"{settings['tokens']} tokens each, always {settings['proposals']} proposals, all methods in one run, "
            f"95 % intervals; {'; '.join([*found.get('departures', ()), made['hardware']])}.\n\n"
            f"{shown.table()}\n{shown.behind()}\n"
        )
    if README_ACCEPTANCE in data:
        lines.append(f"![Tokens per target pass by method and temperature](benchmarks/plots/{README_PICTURE})\n")
    lines += [
        tables.repeatability_in_short(data[name])
        for name in ("repeatability_published", "repeatability")
        if name in data
    ]
    if not lines:
        lines.append("There is no measurement of this version yet; `make results` makes one.\n")
    reports = ["benchmarks/RESULTS.md", *(name for name, (source, _) in REPORTS.items() if source in data)]
    links = "; ".join(f"[{Path(name).name}]({name}), {LINKS[name]}" for name in reports)
    return "\n".join([*lines, f"In full: {links}.\n"])


def with_part(readme: str, part: str) -> str:
    """The README with another part between the marks.

    Raises:
        SystemExit: The marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README} must have the lines {BEGIN.strip()!r} and {END.strip()!r}.")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def render(data: Data, root: Path) -> dict[str, str]:
    """All reports that the data has something for, by path in the repository.

    Args:
        data: From `read`.
        root: Of the repository, whose README is taken.
    """
    found = {"benchmarks/RESULTS.md": results(data)}
    found |= {name: writer(data[source]) for name, (source, writer) in REPORTS.items() if source in data}
    if (readme := root / README).exists():
        found[README] = with_part(readme.read_text(encoding="utf-8"), readme_part(data))
    return found


def pictures(data: Data) -> dict[str, Callable[[Path], object]]:
    """By file name, what draws each picture that the reports refer to."""

    def plots() -> Any:
        from benchmarks.report import plots  # Checking needs no matplotlib.

        return plots

    found: dict[str, Callable[[Path], object]] = {}
    if README_ACCEPTANCE in data:
        accepted = tables.Accepted(data[README_ACCEPTANCE])
        found[README_PICTURE] = lambda path: plots().tokens_per_pass(accepted, path)
    if "learning" in data:
        found["learning.png"] = lambda path: plots().learning_curve(data["learning"], path)
    if "speed" in data:
        suite = Suite(data["speed"])
        found["speedup_by_workload.png"] = lambda path: plots().speedup_by_workload(suite.main, path)
        if varies(suite.by_ratio, "ratio"):
            label = "cost of a target pass in draft passes"
            found["speedup_by_ratio.png"] = lambda path: plots().speedup_along(suite.by_ratio, "ratio", label, path)
        if varies(suite.by_batch, "concurrency"):
            found["speedup_by_concurrency.png"] = lambda path: plots().speedup_along(
                suite.by_batch, "concurrency", "requests in a batch", path
            )
        found["acceptance_by_position.png"] = lambda path: plots().acceptance_by_position(suite.in_main, path)
        found["step_by_phase.png"] = lambda path: plots().step_by_phase(suite.in_main, path)
    if "scaling" in data:
        found["scaling.png"] = lambda path: plots().scaling(data["scaling"]["rows"], path)
    return found


def differences(data: Data, root: Path) -> Iterator[str]:
    """A line for everything in which committed reports are not what would be written."""
    rendered = render(data, root)
    for name, wanted in rendered.items():
        path = root / name
        if not path.exists():
            yield f"{name} is missing"
            continue
        lines = path.read_text(encoding="utf-8").splitlines(), wanted.splitlines()
        yield from difflib.unified_diff(*lines, f"{name}, as it is", f"{name}, from the data", lineterm="", n=0)
    for name in REPORTS:
        if name not in rendered and (root / name).exists():
            yield f"{name} is there, but its data is not"
    folder, referred = root / "benchmarks/plots", set(re.findall(r"[(/]plots/(.+?)\)", "".join(rendered.values())))
    there = {path.name for path in folder.glob("*.png")}
    yield from (f"plots/{name} is referred to, but missing" for name in sorted(referred - there))
    yield from (f"plots/{name} is there, but no report refers to it" for name in sorted(there - referred))


def write(data: Data, root: Path) -> None:
    """Write all reports and pictures, and remove those that have no data any more."""
    rendered, drawn = render(data, root), pictures(data)
    for name in REPORTS:
        if name not in rendered:
            (root / name).unlink(missing_ok=True)
    for name, text in rendered.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
        print(f"wrote {root / name}")
    folder = root / "benchmarks/plots"
    for path in folder.glob("*.png"):
        if path.name not in drawn:
            path.unlink()
    for name, draw in drawn.items():
        draw(folder / name)


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository, or of another folder to write to")
    parser.add_argument("--data", type=Path, help="instead of benchmarks/data there")
    options = parser.parse_args()
    data = read(options.data or options.root / "benchmarks/data")
    if not options.check:
        write(data, options.root)
    elif lines := list(differences(data, options.root)):
        sys.exit("\n".join([*lines, "Write the reports again: python -m benchmarks.report.report"]))


if __name__ == "__main__":
    main()
