"""What a pass of a target and a pass of a draft cost in vLLM, and which shape of the target costs a given ratio."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # The timers are in the engine's process.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # One thread: the small models are too small to share. Set by the caller otherwise.
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
# Widths to try, as multiples of the target's: the first whose layers stay under `MOST_LAYERS` is taken.
MULTIPLES = (1, 2, 4, 8)
MOST_LAYERS = 32
PROBES = (4, 12)  # Further layers to measure with; a pass costs the same for each.
TOKENS = 200


def run_python(script: str, job: dict[str, Any]) -> dict[str, Any]:
    """Call a benchmark script in a process of its own, with `--job FILE`; it writes `FILE.result`.

    Args:
        script: Its file name in this folder.
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
            [sys.executable, str(Path(__file__).parent / script), "--job", str(path)],
            env={**ENVIRONMENT, **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        result = path.with_suffix(".result")
        if finished.returncode or not result.exists():
            raise RuntimeError(f"{script} failed:\n{finished.stdout[-4000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of the passes of an engine at batch 1.

    Args:
        job: `target`; `draft` or `None`; `overrides` of the target's configuration, whose weights are then random.
    """
    from phases import Phases
    from vllm import LLM, SamplingParams

    speculative = job["draft"] and {
        "method": "tokentiming", "model": job["draft"], "num_speculative_tokens": 5, "adaptive_length": False,
    }  # fmt: skip
    llm = LLM(
        job["target"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        hf_overrides=job["overrides"],
        load_format="dummy" if job["overrides"] else "auto",
        speculative_config=speculative,
    )
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    llm.generate(["A"], parameters, use_tqdm=False)  # Warm-up
    phases = Phases(llm)
    llm.generate(["A"], parameters, use_tqdm=False)
    return {name: phase["median"] for name, phase in phases.take().items()}


def shape_for_ratio(target: Path, draft: Path, ratio: float) -> tuple[int, int, dict[str, Any]]:
    """Find the shape with which a target pass costs `ratio` draft passes, at batch 1.

    Args:
        target: The trained target.
        draft: The draft.
        ratio: Seconds of a target pass, over seconds of a draft pass.

    Returns:
        Width, layers, and what was measured. A ratio that the smallest shape exceeds gets the smallest shape.
    """
    from transformers import AutoConfig
    from widen import widened_config

    config = AutoConfig.from_pretrained(target)
    first = run_python("pass_times.py", {"target": str(target), "draft": str(draft), "overrides": {}})
    wanted = ratio * first["draft pass"]
    old = config.num_hidden_layers
    for multiple in MULTIPLES:
        hidden = config.hidden_size * multiple
        layers = [old + more for more in PROBES]
        times = [
            run_python(
                "pass_times.py",
                {"target": str(target), "draft": None, "overrides": widened_config(config, hidden, number)},
            )["target pass"]
            for number in layers
        ]
        per_layer, rest = np.polyfit(layers, times, 1)
        needed = max(old, round((wanted - rest) / per_layer))
        if needed <= MOST_LAYERS or multiple == MULTIPLES[-1]:
            break
    expected = (rest + per_layer * needed) / first["draft pass"]
    reason = {"ratio": ratio, "expected_ratio": expected, "draft_pass_seconds": first["draft pass"]}
    return hidden, needed, {**reason, "probes": dict(zip(map(str, layers), times, strict=True))}


def main() -> None:
    """Answer `run_python`."""
    path = Path(sys.argv[sys.argv.index("--job") + 1])
    path.with_suffix(".result").write_text(json.dumps(measure(json.loads(path.read_text()))))


if __name__ == "__main__":
    main()
