"""What a pass of a target and a pass of a draft cost in vLLM, and which shape of the target costs a given ratio."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.grid import with_draft
from benchmarks.engines.conditions import answer, run_python, start

# Widths to try, as multiples of the target's: the first whose layers stay under `MOST_LAYERS` is taken.
MULTIPLES = (1, 2, 4, 8)
MOST_LAYERS = 32
PROBES = (4, 12)  # Further layers to measure with; a pass costs the same for each.
TOKENS = 200


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of the passes of an engine at batch 1.

    Args:
        job: `target`; `draft` or nothing; `engine`; `overrides` of the target's configuration, whose
            weights are then random.
    """
    from vllm import SamplingParams

    from benchmarks.engines.phases import Phases

    speculative = job["draft"] and with_draft("tokentiming", 5, job["draft"], adaptive_length=False)
    given = {"hf_overrides": job["overrides"], "load_format": "dummy"} if job["overrides"] else {}
    llm = start(job["target"], speculative, {**job["engine"], **given})
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    llm.generate(["A"], parameters, use_tqdm=False)  # Warm-up
    phases = Phases(llm)
    llm.generate(["A"], parameters, use_tqdm=False)
    return {name: phase["median"] for name, phase in phases.take().items()}


def shape_for_ratio(target: Path, draft: Path, ratio: float, engine: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
    """Find the shape with which a target pass costs `ratio` draft passes, at batch 1.

    Args:
        target: The trained target.
        draft: The draft.
        ratio: Seconds of a target pass, over seconds of a draft pass.
        engine: How engines are started, from `conditions.engine_of`.

    Returns:
        Width, layers, and what was measured. A ratio that the smallest shape exceeds gets the smallest shape.
    """
    from transformers import AutoConfig

    from benchmarks.speed.widen import widened_config

    config = AutoConfig.from_pretrained(target)

    def passes(drafting: bool, overrides: dict[str, Any]) -> dict[str, Any]:
        job = {"target": str(target), "draft": drafting and str(draft), "overrides": overrides, "engine": engine}
        return run_python("benchmarks.speed.pass_times", job)

    first = passes(True, {})
    wanted = ratio * first["draft pass"]
    old = config.num_hidden_layers
    for multiple in MULTIPLES:
        hidden = config.hidden_size * multiple
        layers = [old + more for more in PROBES]
        times = [passes(False, widened_config(config, hidden, number))["target pass"] for number in layers]
        per_layer, rest = np.polyfit(layers, times, 1)
        needed = max(old, round((wanted - rest) / per_layer))
        if needed <= MOST_LAYERS or multiple == MULTIPLES[-1]:
            break
    expected = (rest + per_layer * needed) / first["draft pass"]
    reason = {"ratio": ratio, "expected_ratio": expected, "draft_pass_seconds": first["draft pass"]}
    return hidden, needed, {**reason, "probes": dict(zip(map(str, layers), times, strict=True))}


if __name__ == "__main__":
    answer(measure)
