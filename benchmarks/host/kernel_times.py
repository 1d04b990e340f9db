"""What the alignment kernels cost beside their plain references and beside what a user would pick instead.

On real tokens: the draft's own tokens of held-out text, and the target's tokens of the same bytes, n of each. Sides:

- `kernel`: `warp` or `span_blocks`, pieces in and blocks out;
- `plain reference`: the oracle of the tests (`tests/support/reference_alignment.py`), which only says what is right;
- `Python loop, rapidfuzz`: the recurrence in Python over rapidfuzz's C edit distance, as it is usually written, with a
  numpy matrix of all cells; `in the band, on lists`: the same, as fast as Python gets;
- `rapidfuzz matrix, dtw-python`: all local costs by one call of `rapidfuzz.process.cdist`, warped by dtw-python.

Every side's answer is compared with the kernel's before it is timed. Times are microseconds a call, of the processor's
time of the thread; all sides of a sample are timed in turns, and the ratios are of times taken next to each other:
medians with quartiles.

    python -m benchmarks.host.kernel_times --data DATA      # needs rapidfuzz and dtw-python

DATA has `tokenizers/` and `corpus/` like the tests' (`TOKENTIMING_DATA`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.common.provenance import DATA, ROOT, provenance, write_data
from vllm_tokentiming.align.dtw import span_blocks, warp
from vllm_tokentiming.vocab.pair import Vocabulary

sys.path.insert(0, str(ROOT / "tests" / "support"))
import reference_alignment as reference

PAIRS = [("llama3", "qwen2.5"), ("qwen2.5", "llama2"), ("llama2", "gpt2")]
TEXTS = ["english_stories", "python", "multilingual_mixed"]
WINDOW = 8
SLICE_S = 2e-3  # How long one side is called before the next has its turn.
Work = Callable[[], Any]


@dataclass
class Sample:
    """n tokens of either side that spell the same bytes as far as the shorter side goes."""

    draft: list[bytes]
    target: list[bytes]


def samples(data: Path, size: int, number: int) -> list[Sample]:
    """`number` places in held-out texts of every pair and kind, cut to `size` tokens on either side."""
    found = []
    for names in PAIRS:
        sides = [Vocabulary.of(Tokenizer.from_file(str(data / "tokenizers" / n / "tokenizer.json"))) for n in names]
        target, draft = sides
        for kind in TEXTS:
            texts = json.loads((data / "corpus" / f"{kind}.heldout.json").read_text())
            for text in texts:
                # Whole texts until there are enough: a place must have `size` tokens of either side behind it.
                drafted = [draft.token_bytes[i] for i in draft.encoder.encode(text.encode())]
                proxy = [target.token_bytes[i] for i in target.encoder.encode(text.encode())]
                if min(len(drafted), len(proxy)) >= size:
                    found.append(Sample(drafted[:size], proxy[:size]))
    return found[:: max(1, len(found) // number)][:number]


def python_loop(draft: list[bytes], target: list[bytes]) -> tuple[float, list[tuple[int, int, int, int]]]:
    """Dynamic time warping in Python as it is usually written, over a C edit distance; with blocks."""
    from rapidfuzz.distance.Levenshtein import normalized_distance

    n, m = len(draft), len(target)
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            cost = normalized_distance(draft[i - 1].lstrip(b" "), target[j - 1].lstrip(b" "))
            total[i, j] = cost + min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
    i, j = n, m
    path = [(n - 1, m - 1)]
    while (i, j) != (1, 1):
        i, j = min([(i - 1, j - 1), (i - 1, j), (i, j - 1)], key=lambda cell: total[cell])
        path.append((i - 1, j - 1))
    return float(total[n, m]), reference.blocks_of_path(path[::-1])


def banded_loop(draft: list[bytes], target: list[bytes]) -> tuple[float, list[tuple[int, int, int, int]]]:
    """The same in the band, with nothing in the loop that can stand before it."""
    from rapidfuzz.distance.Levenshtein import normalized_distance

    draft, target = [p.lstrip(b" ") for p in draft], [p.lstrip(b" ") for p in target]
    n, m, infinite = len(draft), len(target), float("inf")
    half = max(WINDOW, abs(n - m))
    total = [[infinite] * m for _ in range(n)]
    for i in range(n):
        for j in range(max(0, i - half), min(m, i + half + 1)):
            before = min(
                total[i - 1][j - 1] if i and j else infinite,
                total[i - 1][j] if i else infinite,
                total[i][j - 1] if j else infinite,
            )
            total[i][j] = normalized_distance(draft[i], target[j]) + (before if i or j else 0)
    i, j = n - 1, m - 1
    path = [(i, j)]
    while i or j:
        steps = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        i, j = min(steps, key=lambda cell: total[cell[0]][cell[1]])
        path.append((i, j))
    return total[-1][-1], reference.blocks_of_path(path[::-1])


def package(draft: list[bytes], target: list[bytes]) -> tuple[float, list[tuple[int, int, int, int]]]:
    """The matrix of local costs by rapidfuzz, warped by dtw-python in the band; with blocks."""
    import dtw
    from rapidfuzz.distance.Levenshtein import normalized_distance
    from rapidfuzz.process import cdist

    costs = cdist([p.lstrip(b" ") for p in draft], [p.lstrip(b" ") for p in target], scorer=normalized_distance)
    found = dtw.dtw(
        costs.astype(np.float64),
        step_pattern="symmetric1",
        window_type="sakoechiba",
        window_args={"window_size": max(WINDOW, abs(len(draft) - len(target)))},
    )
    return found.distance, reference.blocks_of_path(
        list(zip(found.index1.tolist(), found.index2.tolist(), strict=True))
    )


def plain_levenshtein(sample: Sample) -> tuple[Any, Any]:
    """The tests' oracle; it must not remember the distances of the last call."""
    reference.edit_distance.cache_clear()
    cost, path = reference.levenshtein_warp(sample.draft, sample.target, WINDOW)
    return cost, reference.blocks_of_path(path)


def sides_of(sample: Sample) -> dict[str, dict[str, Work]]:
    """For each kernel, what is timed: itself first."""
    draft, target = sample.draft, sample.target
    as_lists = [[len(piece) for piece in side] for side in (draft, target)]
    return {
        "warp": {
            "kernel": lambda: warp(draft, target, window=WINDOW),
            "plain reference": lambda: plain_levenshtein(sample),
            "Python loop, rapidfuzz": lambda: python_loop(draft, target),
            "Python loop, rapidfuzz, in the band, on lists": lambda: banded_loop(draft, target),
            "rapidfuzz matrix, dtw-python": lambda: package(draft, target),
        },
        "span scan": {
            "kernel": lambda: span_blocks(draft, target),
            "plain reference": lambda: reference.blocks_of_offsets(*as_lists),
        },
    }


def check(kernel: str, sides: dict[str, Work]) -> None:
    """Compare the answers: blocks with the reference, whose tie rule is the kernel's; costs with everything else."""
    if kernel == "span scan":
        assert [tuple(block) for block in sides["kernel"]().tolist()] == sides["plain reference"]()
        return
    blocks, cost = sides["kernel"]()
    assert [tuple(block) for block in blocks.tolist()] == sides["plain reference"]()[1]
    for name, work in sides.items():
        other = float(work()[0]) if name != "kernel" else cost
        # The package's matrix is of single precision, and the usual loop has no band.
        assert other <= cost + 1e-4 if name == "Python loop, rapidfuzz" else abs(other - cost) <= 1e-4, name


def per_call(work: Work) -> float:
    """Microseconds of a call, over as many as fill a slice."""
    begin, calls, number = time.thread_time(), 0, 1
    while True:
        for _ in range(number):
            work()
        calls += number
        elapsed = time.thread_time() - begin
        if elapsed >= SLICE_S:
            return elapsed / calls * 1e6
        number = max(1, min(1000, int(calls * (SLICE_S / elapsed - 1)) or 1))


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4)


def measure(places: list[Sample], rounds: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Times and ratios to the kernel, in quartiles, by kernel and side."""
    times: dict[tuple[str, str], list[float]] = {}
    for round_ in range(rounds):
        for sample in places:
            for kernel, sides in sides_of(sample).items():
                if round_ == 0:
                    check(kernel, sides)
                for name, work in sides.items():
                    times.setdefault((kernel, name), []).append(per_call(work))
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (kernel, name), values in times.items():
        ratios = [value / own for value, own in zip(values, times[kernel, "kernel"], strict=True)]
        results.setdefault(kernel, {})[name] = {"us": quartiles(values), "times_the_kernel": quartiles(ratios)}
    return results


def main() -> None:
    """Measure all sizes and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("TOKENTIMING_DATA"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data, or TOKENTIMING_DATA, must name a folder with tokenizers/ and corpus/")
    results = []
    print("| tokens | kernel | side | microseconds: median [quartiles] | times the kernel |\n|---|---|---|---|---|")
    for size in args.sizes:
        places = samples(Path(args.data), size, args.samples)
        for kernel, sides in measure(places, args.rounds).items():
            for name, found in sides.items():
                (low, mid, high), (least, ratio, most) = found["us"], found["times_the_kernel"]
                times = "" if name == "kernel" else f"{ratio:,.1f} [{least:,.1f}, {most:,.1f}]"
                print(
                    f"| {size} x {size} | {kernel} | {name} | {mid:,.2f} [{low:,.2f}, {high:,.2f}] | {times} |",
                    flush=True,
                )
                results.append({"tokens": size, "samples": len(places), "kernel": kernel, "side": name, **found})
    write_data(args.out / "kernels.json", {"provenance": provenance(), "window": WINDOW, "rows": results})


if __name__ == "__main__":
    main()
