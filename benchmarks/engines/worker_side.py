"""What the benchmarks have in an engine's workers, which import this: repairs, timers, and a look around.

vLLM's own methods are measured with the same repairs of its CPU sampler as ours: without them no sampled speculative
decoding is lossless on CPUs.
"""

from typing import Any

import torch
from vllm.model_executor.models.medusa import Medusa
from vllm.platforms import current_platform

from benchmarks.engines.phases import Taken, time_runner
from vllm_tokentiming.vllm import compat

if current_platform.is_cpu():
    compat.repair_cpu_rejection_sampler()
compat.repair_top_k_without_drafts()


def repair_medusa() -> None:
    """Let Medusa heads that propose from a part of the vocabulary load.

    In vLLM 0.32.0, `Medusa.load_weights` (`vllm/model_executor/models/medusa.py`) does not name the token map among
    what it loaded, and the loader takes that for missing. Upstream has to add the name; then this can go.
    """
    load = Medusa.load_weights
    if getattr(load, "repaired", False):
        return

    def load_weights(self: Any, weights: Any) -> set[str]:
        loaded: set[str] = load(self, weights)
        return loaded | ({"token_map"} if self.token_map is not None else set())

    load_weights.repaired = True  # type: ignore[attr-defined]
    Medusa.load_weights = load_weights


repair_medusa()


class WorkerSide:
    """Methods that vLLM adds to its worker (`worker_extension_cls`)."""

    def benchmark_conditions(self: Any) -> dict[str, Any]:
        """What the worker computes with."""
        mode = self.vllm_config.compilation_config.mode
        return {
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "compiled": bool(mode),
            **({"threads": torch.get_num_threads()} if self.device.type == "cpu" else {}),
            "device": self.device.type,
            "runner": "V2" if "worker.gpu.model_runner" in type(self.model_runner).__module__ else "V1",
            "asynchronous": bool(self.scheduler_config.async_scheduling),
            "max_num_seqs": self.scheduler_config.max_num_seqs,
            "max_model_len": self.model_config.max_model_len,
        }

    def benchmark_start_timers(self: Any) -> None:
        """Put timers around the model runner and the draft."""
        self.benchmark_timers = time_runner(self.model_runner)

    def benchmark_take_timers(self: Any) -> Taken:
        """What they have timed since the last time this was called."""
        taken: Taken = self.benchmark_timers.take()
        return taken
