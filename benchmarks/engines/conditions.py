"""How the benchmarks start engines: as users do, but for what stands in this file.

A user's engine is compiled, computes in the model's own type, with as many threads as vLLM chooses, and lives in
processes of its own. What differs is one of these:

- `ENVIRONMENT` and `FIXED`: the same for every method, and no help to any of them.
- What a benchmark asks for (`add_options`), because it has to. The report names it (`departures`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import DATA, RAW, ROOT, revision

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # By default vLLM wants nine tenths of the memory, which a machine that does anything else does not have. Less would
    # not do for vLLM's TLI, whose cache of a target with sliding windows is as if it had none.
    "VLLM_CPU_KVCACHE_SPACE": "4",
    # vLLM's n-gram proposer loads numba, whose pool of threads is also that of the target's kernels: without this,
    # its target runs on more threads than that of the other methods. One is what the proposer asks numba for.
    "NUMBA_NUM_THREADS": "1",
}
FIXED: dict[str, Any] = {
    # Prompts come again at other temperatures, and would be read only once.
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "worker_extension_cls": "benchmarks.engines.worker_side.WorkerSide",
}


def add_pair(parser: argparse.ArgumentParser, name: str) -> None:
    """Let a command line name the two models, and the file that the numbers go to.

    Args:
        parser: Of the command line.
        name: The default name of the data file.
    """
    parser.add_argument("--target", type=Path, default=ROOT / "examples/models/target")
    parser.add_argument("--draft", type=Path, default=ROOT / "examples/models/draft")
    parser.add_argument("--pair", default="the embedded pair", help="what the report calls the two models")
    parser.add_argument("--name", default=name, help="of the data file")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let a command line depart from a user's settings."""
    group = parser.add_argument_group("engine, instead of vLLM's defaults")
    group.add_argument("--dtype", help="of the models, instead of their own")
    group.add_argument("--enforce-eager", action="store_true", help="no compilation")
    group.add_argument("--max-num-seqs", type=int, help="most requests at once")
    group.add_argument("--max-model-len", type=int, help="most tokens of a request")


def engine_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that a command line asks for; those left alone are vLLM's defaults."""
    names = ("dtype", "enforce_eager", "max_num_seqs", "max_model_len")
    return {name: value for name in names if (value := getattr(options, name))}


def start(target: str, speculative: Mapping[str, Any] | None, engine: Mapping[str, Any], seed: int = 0) -> Any:
    """Start a `vllm.LLM`.

    Args:
        target: Folder of the target.
        speculative: vLLM's speculative configuration, or `None`.
        engine: From `engine_of`.
        seed: Of what vLLM samples with.
    """
    from vllm import LLM

    fixed = dict(FIXED)
    if speculative and speculative.get("use_heterogeneous_vocab"):
        # With a target that has sliding windows, vLLM's TLI starts in no other way.
        fixed["disable_hybrid_kv_cache_manager"] = True
    return LLM(target, seed=seed, speculative_config=speculative, **{**fixed, **engine})


def conditions(llm: Any) -> dict[str, Any]:
    """What an engine really runs with, by its worker; see `worker_side.py`."""
    found: dict[str, Any] = llm.collective_rpc("benchmark_conditions")[0]
    return found


def departures(engine: Mapping[str, Any]) -> list[str]:
    """What is not as users have it, in words, for the report."""
    words = []
    if dtype := engine.get("dtype"):
        words.append(f"computed in {dtype}, not in the models' own type")
    if engine.get("enforce_eager"):
        words.append("not compiled")
    if number := engine.get("max_num_seqs"):
        words.append(f"at most {number} requests at once")
    if number := engine.get("max_model_len"):
        words.append(f"requests of at most {number} tokens")
    return words


def environment() -> dict[str, str]:
    """The environment of a process that starts an engine; what the caller's says comes first."""
    found = {**ENVIRONMENT, **os.environ}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**found, "PYTHONPATH": os.pathsep.join(paths)}


def run_python(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a module of the benchmarks in a process of its own, with `--job FILE`; it writes `FILE.result`.

    Args:
        module: Its full name.
        job: What it reads.

    Returns:
        What it wrote.

    Raises:
        RuntimeError: It failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        finished = subprocess.run(
            [sys.executable, "-m", module, "--job", str(path)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        result = path.with_suffix(".result")
        if finished.returncode or not result.exists():
            raise RuntimeError(f"{module} failed:\n{finished.stdout[-4000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def run_once(module: str, job: dict[str, Any], name: str) -> dict[str, Any]:
    """Call `run_python`, unless an earlier run that was cut off has the result of the same job and revision.

    Args:
        module: Its full name.
        job: What it reads.
        name: Of the file in `RAW` that keeps the result. It holds one result: another job replaces it.

    Returns:
        What the module wrote.

    Raises:
        RuntimeError: It failed.
    """
    path = RAW / f"{name}.json"
    described: dict[str, Any] = {"module": module, "job": job, "revision": revision()}
    known = path.exists() and not described["revision"]["modified"]  # Else nothing tells what the files were.
    if known and (kept := json.loads(path.read_text()))["of"] == described:
        found: dict[str, Any] = kept["result"]
        return found
    result = run_python(module, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under its own name only once it is whole.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"of": described, "result": result}))
    partial.rename(path)
    return result


def answer(measure: Any) -> bool:
    """Answer `run_python`, if this process was started by it.

    Args:
        measure: Called with the job; returns what JSON can hold.

    Returns:
        Whether it was.
    """
    if "--job" not in sys.argv:
        return False
    path = Path(sys.argv[sys.argv.index("--job") + 1])
    path.with_suffix(".result").write_text(json.dumps(measure(json.loads(path.read_text()))))
    return True
