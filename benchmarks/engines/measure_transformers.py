"""Measures one cell of the suite in transformers: universal assisted generation, and plain; `suite.py` starts it."""

import statistics
import time
from collections import defaultdict
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines.conditions import answer
from benchmarks.engines.measure_vllm import processor_seconds


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Conditions and rows, as `measure_vllm.measure` gives them; one request at a time."""
    target, tokenizer = _load(job, "target")
    passes: dict[str, list[float]] = {"target pass": _timed(target)}
    arguments: dict[str, Any] = {}
    if job["draft"]:
        draft, draft_tokenizer = _load(job, "draft")
        passes["draft pass"] = _timed(draft)
        # As many proposals in every step as the other methods make.
        settings = draft.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = job["proposals"], "constant"
        settings.assistant_confidence_threshold = 0.0
        arguments = {"assistant_model": draft, "tokenizer": tokenizer, "assistant_tokenizer": draft_tokenizer}
    rows = []
    for temperature in job["temperatures"]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        for case in job["cases"]:
            groups: list[dict[str, Any]] = []
            totals: defaultdict[str, list[float]] = defaultdict(list)
            for number, prompt in enumerate(case["prompts"]):
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                torch.manual_seed(job["seed"] + number)
                for taken in passes.values():
                    taken.clear()
                began, others = time.perf_counter(), processor_seconds()
                written = target.generate(
                    ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id,
                    min_new_tokens=job["tokens"], max_new_tokens=job["tokens"], **sampling, **arguments,
                )  # fmt: skip
                seconds, others = time.perf_counter() - began, processor_seconds() - others
                groups.append(
                    {
                        "seconds": seconds,
                        "others": max(0.0, others) / seconds / (psutil.cpu_count() or 1),
                        "target_ids": [written[0, ids.shape[1] :].tolist()],
                        # All of them, unlike in vLLM: under speculation the pass that reads the prompt verifies, too.
                        "passes": len(passes["target pass"]),
                        "tokens": written.shape[1] - ids.shape[1],
                    }
                )
                totals["target pass"] += passes["target pass"][1:]
                totals["draft pass"] += passes.get("draft pass", [])
            rows.append(
                {
                    "temperature": temperature,
                    "workload": case["workload"],
                    "concurrency": 1,
                    "groups": groups,
                    "phases": {
                        name: {"calls": len(values), "seconds": sum(values), "median": statistics.median(values)}
                        for name, values in totals.items()
                        if values
                    },
                }
            )
    found = {"dtype": str(target.dtype).removeprefix("torch."), "compiled": False, "threads": torch.get_num_threads()}
    return {"conditions": {**found, "device": target.device.type}, "rows": rows}


def _load(job: dict[str, Any], name: str) -> tuple[Any, Any]:
    folder = job[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=job["engine"].get("dtype", "auto")).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _timed(model: Any) -> list[float]:
    """Seconds of each pass of a model, from now on."""
    seconds: list[float] = []
    starts: list[float] = []
    model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    model.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - starts.pop()))
    return seconds


if __name__ == "__main__":
    answer(measure)
