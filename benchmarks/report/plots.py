"""Pictures of the suite's results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common.grid import METHODS, OURS, PLAIN
from benchmarks.report.results import Measured
from benchmarks.report.tables import Accepted

# A method has one colour in all pictures; ours has the first.
COLOURS = {
    method: plt.get_cmap("tab20")(2 * place % 20 + place // 10)
    for place, method in enumerate(sorted(METHODS, key=lambda name: name != OURS))
}


def _save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
    return path


def _methods(measured: Sequence[Measured]) -> list[str]:
    return [method for method in METHODS if any(m.method == method for m in measured)]


def tokens_per_pass(accepted: Accepted, path: Path) -> Path:
    """Bars with intervals: a group for each temperature; plain decoding has 1."""
    methods = [method for method in METHODS if method in accepted.methods and method != PLAIN]
    figure, axes = plt.subplots(figsize=(1.6 + 1.6 * len(accepted.temperatures), 2.8))
    width = 0.85 / len(methods)
    for place, method in enumerate(methods):
        found = [accepted.tokens_per_pass(method, temperature) for temperature in accepted.temperatures]
        heights = np.array([estimate.value for estimate in found])
        axes.bar(
            [x + (place - (len(methods) - 1) / 2) * width for x in range(len(found))], heights, width,
            yerr=np.abs(np.array([[e.low, e.high] for e in found]).T - heights),
            color=COLOURS[method], label=method, error_kw={"lw": 0.8},
        )  # fmt: skip
    axes.set_xticks(range(len(accepted.temperatures)), [f"T = {t:g}" for t in accepted.temperatures])
    axes.set(ylabel="tokens per target pass", ylim=(1, None))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def speedup_by_workload(measured: Sequence[Measured], path: Path) -> Path:
    """Bars with intervals: a panel for each temperature, a group for each workload; 1 is plain decoding."""
    temperatures = sorted({m.case.temperature for m in measured})
    names = list(dict.fromkeys(m.case.workload for m in measured))
    methods = _methods(measured)
    figure, panels = plt.subplots(
        len(temperatures), 1, figsize=(1.6 + 1.5 * len(names), 2.6 * len(temperatures)), sharex=True, squeeze=False
    )
    width = 0.8 / len(methods)
    for panel, temperature in zip(panels[:, 0], temperatures, strict=True):
        for place, method in enumerate(methods):
            found = {
                m.case.workload: m.speedup()
                for m in measured
                if (m.method, m.case.temperature) == (method, temperature)
            }
            bars = [(names.index(name), estimate) for name, estimate in found.items() if estimate]
            if not bars:
                continue
            heights = np.array([estimate.value for _, estimate in bars])
            errors = np.abs(np.array([[e.low, e.high] for _, e in bars]).T - heights)
            panel.bar(
                [x + (place - (len(methods) - 1) / 2) * width for x, _ in bars], heights, width,
                yerr=errors, color=COLOURS[method], label=method, error_kw={"lw": 0.8},
            )  # fmt: skip
        panel.axhline(1, color="black", lw=0.8)
        panel.set_ylabel(f"speed-up, T = {temperature:g}")
    panels[-1, 0].set_xticks(range(len(names)), names, rotation=20, ha="right")
    # The highest temperature's has every method; at 0 all outputs of one may loop.
    panels[-1, 0].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def speedup_along(measured: Sequence[Measured], axis: str, label: str, path: Path) -> Path:
    """Lines with intervals over an axis of the case, a panel for each temperature."""
    temperatures = sorted({m.case.temperature for m in measured})
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=(3.6 * len(temperatures), 3), sharey=True, squeeze=False
    )
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        for method in _methods(measured):
            points = sorted(
                (getattr(m.case, axis), estimate)
                for m in measured
                if (m.method, m.case.temperature) == (method, temperature) and (estimate := m.speedup())
            )
            if not points:
                continue
            x, y = [place for place, _ in points], np.array([estimate.value for _, estimate in points])
            errors = np.abs(np.array([[e.low, e.high] for _, e in points]).T - y)
            panel.errorbar(x, y, yerr=errors, marker="o", ms=4, capsize=2, color=COLOURS[method], label=method)
        panel.axhline(1, color="black", lw=0.8)
        panel.set_xscale("log", base=2)
        ticks = sorted({getattr(m.case, axis) for m in measured})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set(xlabel=label, title=f"T = {temperature:g}")
    panels[0, 0].set_ylabel("speed-up")
    panels[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def acceptance_by_position(measured: Sequence[Measured], path: Path) -> Path:
    """Lines: in which share of the steps at least 1, 2, ... proposals were accepted."""
    temperatures = sorted({m.case.temperature for m in measured})
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=(3.6 * len(temperatures), 3), sharey=True, squeeze=False
    )
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        for m in measured:
            if m.case.temperature == temperature and (shares := m.acceptance()):
                panel.plot(range(1, len(shares) + 1), shares, "o-", ms=4, color=COLOURS[m.method], label=m.method)
        panel.set(xlabel="position", title=f"T = {temperature:g}", ylim=(0, 1))
    panels[0, 0].set_ylabel("share accepted up to here")
    panels[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def step_by_phase(measured: Sequence[Measured], path: Path) -> Path:
    """Stacked bars: milliseconds of an average step."""
    rows = [(f"{m.method}, T = {m.case.temperature:g}", m.phases()) for m in measured if m.phases()]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.35 * len(rows)))
    left = np.zeros(len(rows))
    for place, phase in enumerate(rows[0][1] if rows else ()):
        values = np.array([1e3 * phases[phase] for _, phases in rows])
        axes.barh(range(len(rows)), values, left=left, color=plt.get_cmap("Set2")(place), label=phase)
        left += values
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def scaling(results: Sequence[dict[str, Any]], path: Path) -> Path:
    """Lines with quartiles: a panel for each axis of `scaling.py`, a colour for each part, a style for each mode."""
    axes = list(dict.fromkeys(result["axis"] for result in results))
    parts = list(results[0]["us"])
    figure, panels = plt.subplots(1, len(axes), figsize=(3.4 * len(axes), 3), sharey=True, squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        for place, part in enumerate(parts):
            for mode, style in (("sampled", "-"), ("greedy", "--")):
                points = [r for r in results if (r["axis"], r["mode"]) == (axis, mode)]
                values = [r["at"][axis] for r in points]
                low, middle, high = np.array([r["us"][part] for r in points]).T
                colour = plt.get_cmap("tab10")(place)
                panel.plot(values, middle, style, marker=".", color=colour, label=f"{part}, {mode}")
                panel.fill_between(values, low, high, color=colour, alpha=0.15, lw=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(values, [f"{value:,}" for value in values], fontsize="small", rotation=30)
        panel.minorticks_off()
        panel.set_xlabel(axis)
    panels[0, 0].set_ylabel("µs for a request and step")
    panels[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def learning_curve(found: dict[str, Any], path: Path) -> Path:
    """Lines over the tokens verified so far: a panel for each kind of text and temperature; a window slides."""
    panels = list(dict.fromkeys((row["workload"], row["temperature"]) for row in found["rows"]))
    figure, drawn = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3), sharey=True, squeeze=False)
    for axes, (workload, temperature) in zip(drawn[0], panels, strict=True):
        for learns, label, style in ((True, "learning", "-"), (False, "not learning", "--")):
            (row,) = (
                row
                for row in found["rows"]
                if (row["workload"], row["temperature"], row["learning"]) == (workload, temperature, learns)
            )
            width = max(1, len(row["tokens"]) // 4)
            tokens, passes = (np.convolve(row[name], np.ones(width), "valid") for name in ("tokens", "passes"))
            verified = np.cumsum(row["tokens"])[width - 1 :]
            axes.plot(verified, tokens / passes, style, color=COLOURS[OURS], label=label)
        axes.set(xlabel="tokens verified", title=f"{workload}, T = {temperature:g}")
    drawn[0, 0].set_ylabel("tokens per target pass")
    drawn[0, -1].legend(fontsize="small")
    return _save(figure, path)
