"""Which of vLLM's model runners runs: the one that vLLM would choose for the target without us.

vLLM keeps custom proposers away from runner V2. The plugin takes that back for ours if this vLLM has all that our part
of V2 needs. ``VLLM_USE_V2_MODEL_RUNNER`` and whatever else vLLM looks at decide as ever.
"""

from __future__ import annotations

from typing import Any

from vllm_tokentiming.config import PROPOSER
from vllm_tokentiming.vllm import patches
from vllm_tokentiming.vllm.requirements import FOR_V2, check_runner_v2, missing


def install() -> None:
    """Let vLLM choose runner V2 for our method, and let workers that run it hook into it."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerBase

    since = "0.32.0, 0.33.0"
    until = "a plugin may register a speculator for runner V2"
    patches.install(
        VllmConfig, "_get_v2_model_runner_unsupported_features", _unsupported_features, since=since, until=until
    )  # fmt: skip
    patches.install(WorkerBase, "__init__", _init_worker, since=since, until=until)


def reason_for_v2() -> str:
    """Say, for the log, why runner V2 runs."""
    from vllm import envs

    asked = envs.VLLM_USE_V2_MODEL_RUNNER
    return "which VLLM_USE_V2_MODEL_RUNNER asks for" if asked else "which vLLM chooses where Triton is"


def _unsupported_features(list_features: Any, vllm_config: Any) -> list[str]:
    features: list[str] = list_features(vllm_config)
    if is_ours(vllm_config) and not missing(FOR_V2):
        return [feature for feature in features if "custom_class" not in feature]
    return features


def _init_worker(init: Any, worker: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    init(worker, vllm_config, *args, **kwargs)
    if is_ours(vllm_config) and vllm_config.use_v2_model_runner:
        from vllm_tokentiming.vllm import runner_v2

        check_runner_v2()
        runner_v2.install()


def is_ours(vllm_config: Any) -> bool:
    """Return whether an engine asks for our method."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method == "custom_class" and speculative.model == PROPOSER
