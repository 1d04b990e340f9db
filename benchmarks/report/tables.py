"""Sections of `RESULTS.md` from the data of one program each."""

import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common.grid import OURS, PLAIN
from benchmarks.report.parts import dtype_of, origin, spread, table
from benchmarks.report.results import Estimate, ratio_of_sums

Data = dict[str, Any]


class Accepted:
    """The rows of `acceptance.py`."""

    def __init__(self, found: Data) -> None:
        """Take the file's content."""
        self._rows = found["rows"]
        self.workloads = list(dict.fromkeys(row["workload"] for row in found["rows"]))
        self.methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
        self.temperatures = sorted({row["temperature"] for row in found["rows"]})

    def _of(self, method: str, temperature: float, workload: str | None = None) -> list[dict[str, Any]]:
        return [
            row
            for row in self._rows
            if (row["method"], row["temperature"]) == (method, temperature) and workload in (None, row["workload"])
        ]

    def _column(self, method: str, temperature: float, name: str, workload: str | None) -> npt.NDArray[np.float64]:
        groups = [group for row in self._of(method, temperature, workload) for group in row[name]]
        return np.array([groups], dtype=float)

    def tokens_per_pass(self, method: str, temperature: float, workload: str | None = None) -> Estimate:
        """Tokens over passes; of all kinds of text, unless one is named."""
        return ratio_of_sums(*(self._column(method, temperature, name, workload) for name in ("tokens", "passes")))

    def times(self, method: str, other: str, temperature: float, workload: str | None = None) -> Estimate:
        """How many times as many tokens a pass a method has as another one, the same prompts side by side."""
        # All write equally many tokens, so fewer passes are more tokens in one.
        return ratio_of_sums(*(self._column(name, temperature, "passes", workload) for name in (other, method)))

    def greedy(self, method: str) -> str:
        """How many greedy outputs were plain decoding's."""
        rows = [row for row in self._of(method, 0.0) if "different" in row]
        outputs, different = (sum(row[name] for row in rows) for name in ("outputs", "different"))
        return f"{outputs - different} of {outputs}" if rows else ""

    def table(self) -> str:
        """Tokens per pass by method and temperature; plain decoding's is 1."""
        greedy = any(self.greedy(method) for method in self.methods)
        head = ["tokens per pass", *(f"T = {t:g}" for t in self.temperatures), *["greedy outputs kept"] * greedy]
        rows = [
            (m, *(self.tokens_per_pass(m, t) for t in self.temperatures), *[self.greedy(m)] * greedy)
            for m in self.methods
            if m != PLAIN
        ]
        return table(head, rows)

    def behind(self) -> str:
        """A sentence: where another method has more tokens per pass than ours, as far as the intervals can tell."""
        others = [name for name in self.methods if name not in (OURS, PLAIN)]
        if OURS not in self.methods:
            return ""
        found = [(name, t, self.times(OURS, name, t)) for t in self.temperatures for name in others]
        losses = [
            f"than `{name}` at T = {t:g} ({estimate} times as many)" for name, t, estimate in found if estimate.high < 1
        ]
        if not losses:
            return f"No method has more than `{OURS}`, as far as the intervals can tell."
        return f"`{OURS}` has fewer {', '.join(losses)}."

    def by_workload(self, temperature: float) -> str:
        """Tokens per pass by kind of text and method."""
        methods = [method for method in self.methods if method != PLAIN]
        rows = [(w, *(self.tokens_per_pass(m, temperature, w) for m in methods)) for w in self.workloads]
        return table((f"T = {temperature:g}", *methods), rows)


def acceptance(found: Data) -> str:
    """Of `acceptance.py`: tokens per target pass by temperature."""
    accepted, settings, dtype = Accepted(found), found["settings"], dtype_of(found)
    rounding = ", in which a pass of several tokens may round two nearly equal logits otherwise than a pass of one"
    text = (
        f"{settings['num_prompts']} prompts of each kind ({', '.join(settings['workloads'])}), {settings['tokens']} "
        f"tokens each, "
        f"{settings['group']} in a batch, always {settings['proposals']} proposals, 95 % intervals. "
        f"*Greedy outputs kept*: those that are plain decoding's, token by token, in {dtype}"
        f"{rounding * (dtype != 'float32')}.\n\n" + accepted.table()
    )
    others = [name for name in accepted.methods if name not in (OURS, PLAIN)]
    if OURS in accepted.methods and others:
        rows = [(name, *(accepted.times(OURS, name, t) for t in accepted.temperatures)) for name in others]
        text += f"\n{accepted.behind()}\n\nHow many times as many `{OURS}` has, the same prompts side by side. "
        text += (
            "Above T = 0, each method writes another text after the same prompt, which few prompts do not even out:\n\n"
        )
        text += table(("than", *(f"T = {t:g}" for t in accepted.temperatures)), rows)
    if len(accepted.workloads) > 1:
        text += "\nBy kind of text:\n\n" + "\n".join(accepted.by_workload(t) for t in accepted.temperatures)
    return text + origin(found)


def greedy(found: Data) -> str:
    """Of `acceptance.py` in float32 at temperature 0: whether greedy output is plain decoding's."""
    rows = [row for row in found["rows"] if "different" in row]
    different, outputs = (sum(row[name] for row in rows) for name in ("different", "outputs"))
    return (
        f"{outputs - different:,} of {outputs:,} greedy outputs of {found['settings']['tokens']} tokens are plain "
        "decoding's, token by token.\n\n"
        + table(("method", "same"), [(m, Accepted(found).greedy(m)) for m in dict.fromkeys(r["method"] for r in rows)])
        + origin(found)
    )


def repeatability(found: Data) -> str:
    """Of `repeatability.py`: how often texts repeat themselves, and how near the tokens are where they do not."""

    def gap(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    rows = [
        (
            f"{row['method']}, {row['way']}",
            f"{row['same_greedy']} of {row['outputs']}",
            gap(row["median_gap"]),
            gap(row["largest_gap"]),
            f"{row['same_seeded']} of {row['outputs']}",
        )
        for row in found["rows"]
    ]
    head = ("engine, request", "greedy text is plain decoding's alone", "median gap", "largest gap")
    return (
        f"{found['pair']}, {found['settings']['tokens']} tokens each. Alone: one request after another; together: all "
        "at once. Gap: where a greedy text first differs, how far apart the log-probabilities of the two tokens are. "
        "Seeded: at temperature 0.8, the text is what the same engine writes for the request alone.\n\n"
        + table((*head, "seeded text repeats itself"), rows)
        + origin(found)
    )


def repeatability_in_short(found: Data) -> str:
    """Of `repeatability.py`, in a paragraph: how many texts repeat themselves, and the widest gap where they do not."""

    def said(method: str, rows: list[Data]) -> str:
        outputs = sum(row["outputs"] for row in rows)
        counted = [sum(row[name] for row in rows) for name in ("same_greedy", "same_seeded")]
        gaps = [row["largest_gap"] for row in rows if row["largest_gap"] is not None]
        widest = f" (largest gap of the two log-probabilities: {max(gaps):.3f})" if gaps else ""
        return f"{method}, {counted[0]} of {outputs} greedy texts{widest} and {counted[1]} of {outputs} seeded ones"

    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    words = [said(method, [row for row in found["rows"] if row["method"] == method]) for method in methods]
    return (
        f"What repeats itself, {found['pair']}, in {dtype_of(found)}, alone, alone again and in a batch: "
        f"{'; '.join(words)}.\n"
    )


def accelerator(found: Data) -> str:
    """Of `accelerator.py`: tokens a second beside what vLLM does without a draft."""
    rows = {(row["method"], row["temperature"], row["batch"]): row for row in found["rows"]}

    def cell(method: str, temperature: float, batch: int) -> str:
        rates = rows[method, temperature, batch]["tokens_per_second"]
        if method == PLAIN:
            return f"{statistics.median(rates):,.0f}"
        plain = statistics.median(rows[PLAIN, temperature, batch]["tokens_per_second"])
        return f"{spread(np.quantile(rates, (0.25, 0.5, 0.75)) / plain)}"

    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    ways = list(dict.fromkeys((row["temperature"], row["batch"]) for row in found["rows"]))
    drafting = [method for method in methods if method != PLAIN]
    head = [
        "T, requests at once", "plain, tokens a second", *(f"{method}, times as many" for method in drafting),
        *(f"{method}, tokens a pass" for method in drafting),
    ]  # fmt: skip
    lines = [
        (
            f"T = {temperature:g}, {batch}",
            *(cell(method, temperature, batch) for method in methods),
            *(f"{rows[method, temperature, batch]['tokens_per_pass']:.2f}" for method in drafting),
        )
        for temperature, batch in ways
    ]
    conditions = found["conditions"]
    runners = "; ".join(
        f"{name[0].upper()}{name[1:]}: model runner {made['runner']}"
        f"{', scheduled ahead' if made['asynchronous'] else ''}"
        for name, made in conditions.items()
    )
    greedy = [row for row in found["rows"] if row["method"] != PLAIN and row["same_greedy"] is not None]
    same, number = sum(row["same_greedy"] for row in greedy), sum(row["batch"] for row in greedy)
    sameness = f" {same} of {number} greedy texts are plain decoding's." if number else ""
    return (
        f"{found['pair'][0].upper()}{found['pair'][1:]}; {found['settings']['tokens']} tokens each, "
        f"{found['settings']['rounds']} rounds; median and quartiles. {runners}.{sameness}\n\n"
        + table(head, lines)
        + origin(found)
    )


def exactness(found: Data) -> str:
    """Of `exactness.py`: every setting's worst test, and whether the controls were caught."""
    names = [row["setting"] for row in found["rows"]]
    rows = [
        (
            row["setting"] + (f", T = {row['temperature']:g}" if names.count(row["setting"]) > 1 else ""),
            f"{row['sequences']:,}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['least_p']:.2g}",
            f"{row['tv']:.4f}",
            f"{row['tv_expected']:.4f}",
            "exact" if row["passed"] else "not exact",
            "yes" if row["as_it_should_be"] else "**NO**",
        )
        for row in found["rows"]
    ]
    head = ("setting", "outputs", "tokens per pass", "least p", "total variation", "by chance", "found", "as expected")
    checked = [*found["rows"], *(entry for entry in found["others"] if "as_it_should_be" in entry)]
    wrong, levels = sum(not entry["as_it_should_be"] for entry in checked), found["levels"]
    # Short runs write fewer outputs than the power asks for.
    enough = all(row["sequences"] >= row["sequences_needed"] for row in found["rows"] if row["exact"])
    power = (
        f"an error of {levels['total_variation']:g} in total variation is seen with probability {levels['power']:g}."
        if enough
        else f"with fewer outputs than it takes to see an error of {levels['total_variation']:g} in total variation "
        f"with probability {levels['power']:g}."
    )
    return (
        f"{len(rows)} measurements, {wrong} not as they should be. All tests together raise a false alarm with "
        f"probability {levels['family_level']:g} at most; {power}\n\n" + table(head, rows) + origin(found)
    )


def overhead(found: Data) -> str:
    """Of `overhead.py`: microseconds for a request and step, by pair."""
    rows = found["rows"]
    phases = list(dict.fromkeys(phase for row in rows for phase in row["us"]))
    lines = [(row["pair"], row["mode"], *(spread(row["us"][phase]) for phase in phases)) for row in rows]
    batch = found["settings"]["batch"]
    whose = "a request alone" if batch == 1 else f"each of {batch} requests in a step"
    return (
        f"Microseconds a step for {whose}: medians with quartiles.\n\n"
        + table(("pair", "mode", *phases), lines)
        + origin(found)
    )


def startup(found: Data) -> str:
    """Of `startup.py`: what our part of a start takes, by part."""
    measured = [row for row in found["rows"] if "part" in row]
    kept = statistics.median(row["kept_bytes"] for row in found["rows"] if "kept_bytes" in row)
    rows = []
    for way, process, start in dict.fromkeys((row["way"], row["process"], row["start"]) for row in measured):
        parts: dict[str, list[float]] = {}
        for row in measured:
            if (row["way"], row["process"], row["start"]) == (way, process, start):
                parts.setdefault(row["part"], []).append(row["processor"])
        totals = [sum(seconds) for seconds in zip(*parts.values(), strict=True)]
        medians = ", ".join(f"{name} {statistics.median(seconds):.1f}" for name, seconds in parts.items())
        middle = f"{statistics.median(totals):.1f} ({min(totals):.1f} to {max(totals):.1f})"
        rows.append((f"{way}, {process}, {start}", middle, medians))
    return (
        f"{found['pair']}, seconds of processor time, median and range (starts measured: {len(totals)}): *cold* is "
        "the first start of a pair, *warm* any other. Loading the tokenizers through vLLM is part of the vocabularies. "
        f"{kept / 1e6:.0f} MB are kept between starts.\n\n"
        + table(("process", "in all", "by part"), rows)
        + origin(found)
    )


def kernels(found: Data) -> str:
    """Of `kernel_times.py`: microseconds for a call, and how many times the kernel's that is."""
    rows = [
        (row["kernel"], row["tokens"], row["side"], spread(row["us"]), spread(row["times_the_kernel"]))
        for row in found["rows"]
    ]
    return table(("kernel", "tokens", "side", "us", "times the kernel's"), rows) + origin(found)


def serving(found: Data) -> str:
    """Of `serving.py`: latency percentiles by method and request rate."""
    names = (
        "request_throughput",
        "output_throughput",
        "median_ttft_ms",
        "median_tpot_ms",
        "p99_tpot_ms",
        "p99_e2el_ms",
    )
    rows = [
        (run["method"], run["rate"], *(f"{run['result'][name]:.4g}" if name in run["result"] else "" for name in names))
        for run in found["runs"]
    ]
    return (
        f"Target `{found['target']}`, T = {found['settings']['temperature']:g}.\n\n"
        + table(("method", "requests / s asked", *names), rows)
        + origin(found)
    )


def scaling(found: Data) -> str:
    """Of `scaling.py`: a picture."""
    base = ", ".join(f"{axis} {value:,}" for axis, value in found["settings"]["base"].items())
    return (
        f"![cost of a step](plots/scaling.png)\n\nEach axis alone, the others at: {base}. Medians, with quartiles. "
        "`host` is what runs on the host wherever the draft does; the others are tensor work over the vocabulary, here "
        "on this processor: `transfer` what unlike vocabularies add, `any draft` what every draft pays.\n"
        + origin(found)
    )


def step_ratios(found: Data, batch: int) -> tuple[list[float], list[float], list[float]]:
    """Of `draft_step.py`: microseconds a draft pass of ours and of vLLM's, and ratios of neighbours, in order."""
    ours, theirs = (
        [1e6 * row["per_pass"] for row in found["rows"] if row["batch"] == batch and (row["method"] == OURS) is is_ours]
        for is_ours in (True, False)
    )
    return ours, theirs, sorted(a / b for a, b in zip(ours, theirs, strict=True))


def draft_step(found: Data) -> str:
    """Of `draft_step.py`: medians, and ratios of neighbours."""
    rows = []
    for batch in sorted({row["batch"] for row in found["rows"]}):
        ours, theirs, ratios = step_ratios(found, batch)
        extent = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append((batch, f"{statistics.median(ours):.0f}", f"{statistics.median(theirs):.0f}", extent))
    return (
        f"The same draft model ({found['draft']}), with the target's own vocabulary, in our engine and in vLLM's "
        "`draft_model`; all that a proposer does in a step, divided by its passes of the draft.\n\n"
        + table(("batch", "here, µs", "in vLLM's, µs", "ratio"), rows)
        + origin(found)
    )
