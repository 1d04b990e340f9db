"""The entry point ``vllm.general_plugins``: teaches vLLM the method ``tokentiming``.

vLLM calls ``register`` in every process, in the front end before the configuration is built. It prints nothing, may
be called any number of times, and changes nothing for engines that do not ask for us.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_tokentiming.config import (
    INEXACT,
    METHOD,
    PROPOSER,
    SettingsError,
    TokenTimingConfig,
    split_speculative_config,
)
from vllm_tokentiming.metrics import show_in_front_end


def register() -> None:
    """Let ``EngineArgs`` understand our method, and the scheduler tell workers the salts of requests.

    vLLM refuses methods that it does not know (``SpeculativeConfig``, all versions so far); this can go when a plugin
    may register one.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_tokentiming.compat import carry_cache_salts

    carry_cache_salts()
    original = EngineArgs.create_speculative_config
    if getattr(original, "_tokentiming", False):
        return

    @functools.wraps(original)
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        given = self.speculative_config or {}
        method = self.spec_method if getattr(self, "spec_method", None) else given.get("method")
        if method != METHOD and given.get("model") != PROPOSER:
            return original(self, target_model_config, target_parallel_config)
        given = {key.replace("-", "_"): value for key, value in given.items()}
        # vLLM's shorthand options for the same three keys.
        for option, key in (
            ("spec_method", "method"),
            ("spec_model", "model"),
            ("spec_tokens", "num_speculative_tokens"),
        ):
            if getattr(self, option, None) is not None:
                given[key] = getattr(self, option)
                setattr(self, option, None)
        if method == METHOD:
            vllm_part, settings = split_speculative_config(given)
            if METHOD in self.additional_config:
                raise SettingsError(
                    'tokentiming: give the settings either in --speculative-config (method "tokentiming") or in '
                    f'--additional-config (method "custom_class", model "{PROPOSER}"), not in both.'
                )
            self.additional_config = {**self.additional_config, METHOD: settings}
        else:
            vllm_part, settings = given, self.additional_config.get(METHOD, {})
        verification = vllm_part.get("rejection_sample_method", "standard")
        _refuse_early(settings, verification, target_model_config, target_parallel_config)
        show_in_front_end()
        self.speculative_config = vllm_part
        return original(self, target_model_config, target_parallel_config)

    create_speculative_config._tokentiming = True  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


def _refuse_early(
    settings: dict[str, Any], verification: str, target_model_config: Any, target_parallel_config: Any
) -> None:
    """Find out in the front end, before any model is loaded, what would stop a worker.

    Raises:
        SettingsError: Something would.
    """
    parsed = TokenTimingConfig.parse(settings)
    if verification in INEXACT and not parsed.allow_inexact:
        raise SettingsError(
            f'tokentiming: what the "rejection_sample_method" {verification!r} accepts need not be the target\'s; '
            'leave it out, or set "allow_inexact" to true if you want to compare the two.'
        )
    try:
        import vllm_tokentiming.alignment  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"tokentiming: {error}") from error
    from vllm_tokentiming.compat import check_vllm

    check_vllm()
    if target_model_config.runner_type != "generate":
        raise SettingsError(
            "tokentiming needs a target that generates text, and this one is run as a "
            f"{target_model_config.runner_type} model; set --runner to generate or leave --speculative-config out."
        )
    if target_parallel_config.pipeline_parallel_size > 1:
        raise SettingsError(
            "tokentiming does not work with pipeline parallelism yet; set --pipeline-parallel-size to 1 and use tensor "
            "parallelism instead."
        )
    from vllm.platforms import current_platform

    if target_model_config.has_inner_state and current_platform.is_cpu():
        # Of 0.32.0: `causal_conv1d_update_cpu` takes no notice of `num_accepted_tokens`.
        raise SettingsError(
            f"tokentiming cannot speed up {target_model_config.model!r} on a CPU: its layers keep a running state, "
            "which vLLM on CPUs does not take back when a proposal is rejected, so that any speculation changes the "
            "text; use a GPU or leave --speculative-config out."
        )
    from vllm_tokentiming.draft.vllm_config import draft_model_config
    from vllm_tokentiming.vocabularies import load_pair

    load_pair(parsed, target_model_config, draft_model_config(parsed, target_model_config))
