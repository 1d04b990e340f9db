"""Measures one cell of the suite in transformers: universal assisted generation, and plain; `suite.py` starts it."""

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a cell, as `measure_vllm.measure` gives them."""
    torch.set_num_threads(1)
    target, tokenizer = _load(job["target"])
    passes: dict[str, list[float]] = {"target pass": _timed(target)}
    arguments: dict[str, Any] = {}
    if job["draft"]:
        draft, draft_tokenizer = _load(job["draft"])
        passes["draft pass"] = _timed(draft)
        # As many proposals in every step as the other methods make.
        settings = draft.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = job["proposals"], "constant"
        settings.assistant_confidence_threshold = 0.0
        arguments = {"assistant_model": draft, "tokenizer": tokenizer, "assistant_tokenizer": draft_tokenizer}
    rows = []
    for temperature in job["temperatures"]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        for workload, prompts in job["workloads"].items():
            groups: list[dict[str, Any]] = []
            totals: defaultdict[str, list[float]] = defaultdict(list)
            for number, prompt in enumerate(prompts):
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                torch.manual_seed(job["seed"] + number)
                for seconds in passes.values():
                    seconds.clear()
                began, cpu_began = time.perf_counter(), time.process_time()
                written = target.generate(
                    ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id,
                    min_new_tokens=job["tokens"], max_new_tokens=job["tokens"], **sampling, **arguments,
                )  # fmt: skip
                groups.append(
                    {
                        "seconds": time.perf_counter() - began,
                        "cpu_seconds": time.process_time() - cpu_began,
                        "target_ids": [written[0, ids.shape[1] :].tolist()],
                        # All of them, unlike in vLLM: under speculation the pass that reads the prompt verifies, too.
                        "counters": {"passes": len(passes["target pass"]), "tokens": written.shape[1] - ids.shape[1]},
                    }
                )
                totals["target pass"] += passes["target pass"][1:]
                totals["draft pass"] += passes.get("draft pass", [])
            rows.append(
                {
                    "temperature": temperature,
                    "workload": workload,
                    "groups": groups,
                    "phases": {
                        name: {"calls": len(values), "seconds": sum(values), "median": statistics.median(values)}
                        for name, values in totals.items()
                        if values
                    },
                }
            )
    return rows


def _load(folder: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _timed(model: Any) -> list[float]:
    """Seconds of each pass of a model, from now on."""
    seconds: list[float] = []
    starts: list[float] = []
    model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    model.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - starts.pop()))
    return seconds


def main() -> None:
    """Answer `run_python`."""
    path = Path(sys.argv[sys.argv.index("--job") + 1])
    path.with_suffix(".result").write_text(json.dumps({"rows": measure(json.loads(path.read_text()))}))


if __name__ == "__main__":
    main()
