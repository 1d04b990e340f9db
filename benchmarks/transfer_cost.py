"""What the exact transfer costs per draft pass: shaping the law, drawing, and carrying it over, apart from the models.

For vocabularies of several sizes and batches of several sizes, on the device that torch finds, with a table like a real
pair's (one draft token in ten emits two target tokens). Beside each phase stands what a draft with the same vocabulary
pays anyway: softmax and a draw. Times are medians over repetitions, with quartiles, all in one run.

    python benchmarks/transfer_cost.py --out transfer_cost.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_tokentiming.draft.sampling import DraftSampling, draw, law
from vllm_tokentiming.transducer import NOTHING, Waits
from vllm_tokentiming.transfer import Transfer


class Table:
    """Stands for a transducer with random emissions, none of which waits."""

    waiting: np.ndarray = np.empty(0, np.int64)
    left_waiting: tuple[bytes, ...] = ()

    def waits(self, _: bytes) -> Waits:
        """Nothing."""
        return NOTHING

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        """Let one token in ten emit two target tokens, the others one."""
        self.first = rng.permutation(size).astype(np.int64)
        self._longer = np.flatnonzero(rng.random(size) < 0.1)
        self._next = rng.integers(0, size, len(self._longer))

    def alternatives(self, emitted_ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """About as many alternatives as a real first token has."""
        start = emitted_ids[0] % max(1, len(self._longer) - 64)
        return self._longer[start : start + 64], self._next[start : start + 64]


def timed(work: Callable[[], Any], device: torch.device, repetitions: int) -> list[float]:
    """Milliseconds of each repetition, after a warm-up."""

    def once() -> float:
        begin = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - begin) * 1e3

    once()
    return [once() for _ in range(repetitions)]


def measure(vocab: int, batch: int, device: torch.device, repetitions: int) -> dict[str, Any]:
    """Every phase for one size."""
    transfer = Transfer(Table(vocab, np.random.default_rng(0)), vocab, vocab, device)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(batch, vocab, generator=generator) * 3).to(device)
    sampling = [DraftSampling(seed=row, temperature=0.8) for row in range(batch)]
    log_prior = torch.zeros(vocab, device=device)
    uniform = torch.rand(batch, generator=generator).tolist()
    probs = law(logits.clone(), sampling, log_prior)
    q = torch.zeros(batch, 1, vocab, device=device)
    rows = list(range(batch))

    def carry_over() -> None:
        if batch == 1:  # As `Writer` does it.
            transfer.first_rows(probs, out=q[0])
        else:
            q[rows, [0] * batch] = transfer.first_rows(probs)

    def later() -> None:
        for row in range(0, batch, 10):
            q[row, 0] = transfer.later_row(probs[row], (row,))

    phases = {
        "softmax and multinomial (what any draft pays)": lambda: torch.multinomial(logits.softmax(-1), 1).tolist(),
        "law": lambda: law(logits.clone(), sampling, log_prior),
        "draw": lambda: draw(probs, uniform).tolist(),
        "first rows": carry_over,
        "later rows (one request in ten)": later,
    }
    return {name: timed(work, device, repetitions) for name, work in phases.items()}


def main() -> None:
    """Measure all sizes and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000, 256_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    results = []
    print(f"{device.type}, {torch.get_num_threads()} threads; milliseconds per pass: median [quartiles]")
    for vocab in args.vocabularies:
        for batch in args.batches:
            phases = measure(vocab, batch, device, args.repetitions)
            results.append({"vocabulary": vocab, "batch": batch, "milliseconds": phases})
            for name, values in phases.items():
                low, median, high = statistics.quantiles(values, n=4)
                print(
                    f"V {vocab:7d}  batch {batch:3d}  {name:46s} {median:8.2f} [{low:.2f}, {high:.2f}]",
                    flush=True,
                )
    if args.out:
        provenance = {
            "torch": torch.__version__,
            "device": device.type,
            "machine": platform.processor() or platform.machine(),
        }
        args.out.write_text(json.dumps({"provenance": provenance, "results": results}, indent=1))


if __name__ == "__main__":
    main()
