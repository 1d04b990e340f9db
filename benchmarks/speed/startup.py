"""What our own part of a start takes, by part: with nothing kept, after the front end, and with everything kept.

    python -m benchmarks.speed.startup --target FOLDER --draft FOLDER --pair NAME

vLLM starts two processes that read both vocabularies: the front end, which refuses what cannot work, and the worker,
which drafts. Each is measured in a process of its own, first with an empty cache, then once more. What vLLM, the
models' weights, and compiling take is not ours, and not in it.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import provenance, write_data
from benchmarks.engines.conditions import add_pair, answer, run_python

PROCESSES = ("front end", "worker")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of processor time, and seconds that passed, by part, in one process."""
    import os

    os.environ["VLLM_CACHE_ROOT"] = job["cache"]
    from vllm.config import ModelConfig

    from vllm_tokentiming.config import TokenTimingConfig
    from vllm_tokentiming.vllm.vocabulary_loader import load_pair, startup_cache

    target, draft = ModelConfig(model=job["target"]), ModelConfig(model=job["draft"])
    parts: dict[str, list[float]] = {}

    def part(name: str, do: Any) -> Any:
        begin = time.process_time(), time.perf_counter()
        found = do()
        parts[name] = [time.process_time() - begin[0], time.perf_counter() - begin[1]]
        return found

    pair = part(
        "vocabularies", lambda: load_pair(TokenTimingConfig.model_validate({"model": job["draft"]}), target, draft)
    )
    if job["process"] == "worker":
        part("encoders", lambda: (pair.target.encoder, pair.draft.encoder))
        part("transducer", lambda: startup_cache().transducer(pair))
    return parts


def main() -> None:
    """Measure, and write the data file."""
    if answer(measure):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair(parser, "startup")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    sides = {"as named": (options.target, options.draft), "the other way round": (options.draft, options.target)}
    rows = []
    for repetition in range(options.repetitions):
        for way, (target, draft) in sides.items():
            with tempfile.TemporaryDirectory() as cache:
                for start in ("cold", "warm"):
                    for process in PROCESSES:
                        job = {"target": str(target), "draft": str(draft), "cache": cache, "process": process}
                        parts = run_python("benchmarks.speed.startup", job)
                        rows += [
                            {
                                "way": way, "start": start, "process": process, "repetition": repetition, "part": part,
                                "processor": seconds[0], "passed": seconds[1],
                            }
                            for part, seconds in parts.items()
                        ]  # fmt: skip
                        print(f"{way}, {start}, {process}: {sum(own for own, _ in parts.values()):.2f} s", flush=True)
                kept = sum(file.stat().st_size for file in Path(cache).rglob("*.npz"))
                rows.append({"way": way, "repetition": repetition, "kept_bytes": kept})
    content = {"provenance": provenance(), "pair": options.pair, "rows": rows}
    write_data(options.out / f"{options.name}.json", content)


if __name__ == "__main__":
    main()
