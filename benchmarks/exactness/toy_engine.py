"""Engines of the toy pairs, and what they write."""

import contextlib
import dataclasses
import gc
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# An engine reads these when vLLM is imported. One thread: the matrices are tiny.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import numpy.typing as npt

from benchmarks.exactness.toy import Pair, Sampling

MAX_TOKENS = (
    5  # So that the first step after the prompt may propose `NUM_PROPOSALS`: vLLM takes no more than can be used.
)
NUM_PROPOSALS = 3
CHUNK = 4096


@contextlib.contextmanager
def engine(pair: Pair, speculation: Mapping[str, Any] | None, seed: int, **arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` of a pair's target; the last one has to be gone before the next one starts.

    Args:
        pair: Its draft is used unless there is no speculation.
        speculation: Settings of ours, or with `method` any speculative configuration.
        seed: Of what vLLM samples with.
        arguments: For `LLM`.
    """
    from vllm import LLM

    if speculation is not None:
        given = {"model": str(pair.draft), "num_speculative_tokens": NUM_PROPOSALS}
        if "method" not in speculation:  # With targets this cheap, drafting as much as pays is hardly to draft.
            given.update(method="tokentiming", adaptive_length=False)
        arguments["speculative_config"] = {**given, **speculation}
    defaults: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    # vLLM collects garbage ten times in a start, and an engine that ends has thawed all that had been imported.
    gc.collect()
    gc.freeze()
    llm = LLM(str(pair.target), seed=seed, **{**defaults, **arguments})
    try:
        yield weakref.proxy(llm)  # A name that outlives the block shall not keep the engine.
    finally:
        del llm
        gc.collect()


def parameters(sampling: Sampling, **arguments: Any) -> Any:
    """vLLM's parameters of a law."""
    from vllm import SamplingParams

    given = dataclasses.asdict(sampling)
    return SamplingParams(**{**given, "max_tokens": MAX_TOKENS, "ignore_eos": True, "detokenize": False, **arguments})


def write(
    llm: Any,
    samplings: Sequence[Sampling],
    prompt: list[int],
    number: int,
    seeded: bool = False,
    tokens: int = MAX_TOKENS,
) -> list[npt.NDArray[np.int64]]:
    """Let an engine write.

    Args:
        llm: The engine.
        samplings: Requests take turns with these, in one batch.
        prompt: Ids.
        number: Outputs of each sampling.
        seeded: Whether each request has a seed of its own.
        tokens: Of each output.

    Returns:
        For each sampling its outputs, `[number, tokens]`.
    """
    given = [parameters(sampling, max_tokens=tokens) for sampling in samplings]
    total, kinds = number * len(given), len(given)
    outputs = np.empty((total, tokens), dtype=np.int64)
    for start in range(0, total, CHUNK):
        indices = range(start, min(start + CHUNK, total))
        wanted: Any = [given[i % kinds] for i in indices]
        if seeded:
            wanted = [parameters(samplings[i % kinds], seed=i, max_tokens=tokens) for i in indices]
        finished = llm.generate([{"prompt_token_ids": prompt}] * len(indices), wanted, use_tqdm=False)
        outputs[start : indices.stop] = [output.outputs[0].token_ids for output in finished]
    return [outputs[kind::kinds] for kind in range(kinds)]


def spec_counters(llm: Any) -> Counter[str]:
    """Drafts, proposed tokens and accepted tokens that an engine has counted."""
    found: Counter[str] = Counter()
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:spec_decode_num_")
        if name != metric.name and hasattr(metric, "value"):
            found[name] = metric.value
    return found
