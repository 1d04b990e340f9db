"""The entry point ``vllm.general_plugins``: teaches vLLM the method ``tokentiming``.

vLLM calls ``register`` in every process, in the front end before the configuration is built. It prints nothing, may
be called any number of times, and changes nothing for engines that do not ask for us.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vllm_tokentiming.config import (
    INEXACT,
    METHOD,
    PROPOSER,
    SettingsError,
    TokenTimingConfig,
    check_num_speculative_tokens,
    refuse_misnamed,
    settings_in,
    split_speculative_config,
)
from vllm_tokentiming.metrics import show_in_front_end

# vLLM's shorthand options, and what they stand for in the speculative configuration.
_OPTIONS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}


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
        given = _asked_for(self)
        if given is None:
            return original(self, target_model_config, target_parallel_config)
        settings: Mapping[str, Any]
        additional = self.additional_config
        if given.get("method") == METHOD:
            vllm_part, settings = split_speculative_config(given)
            if not isinstance(additional, Mapping):
                raise SettingsError(
                    f"tokentiming: --additional-config is {additional!r}; write a dictionary or leave it out."
                )
            if METHOD in additional:
                raise SettingsError(
                    'tokentiming: give the settings either in --speculative-config (method "tokentiming") or in '
                    f'--additional-config (method "custom_class", model "{PROPOSER}"), not in both.'
                )
            additional = {**additional, METHOD: settings}
        else:
            check_num_speculative_tokens(given.get("num_speculative_tokens"))
            vllm_part, settings = given, settings_in(additional)
        verification = str(vllm_part.get("rejection_sample_method", "standard"))
        number = vllm_part["num_speculative_tokens"]
        _refuse_early(settings, verification, target_model_config, target_parallel_config, number, self)
        show_in_front_end()
        # Only now, so that what was refused can be mended and tried again.
        self.speculative_config, self.additional_config = vllm_part, additional
        for option in _OPTIONS:
            if hasattr(self, option):
                setattr(self, option, None)
        return original(self, target_model_config, target_parallel_config)

    create_speculative_config._tokentiming = True  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


def _asked_for(engine_args: Any) -> dict[str, Any] | None:
    """The speculative configuration, with vLLM's shorthand options for three of its keys; ``None`` if it is not for us.

    Raises:
        SettingsError: It is meant for us and cannot be read.
    """
    given = engine_args.speculative_config or {}
    if not isinstance(given, Mapping):
        if METHOD in str(given).lower():
            raise SettingsError(
                f"tokentiming: the speculative configuration is {given!r}; write one dictionary: "
                '{"method": "tokentiming", "model": "<draft model>", "num_speculative_tokens": 6}.'
            )
        return None
    given = {str(key).replace("-", "_"): value for key, value in given.items()}
    options = {key: value for name, key in _OPTIONS.items() if (value := getattr(engine_args, name, None)) is not None}
    method, model = ((given | options).get(key) for key in ("method", "model"))
    refuse_misnamed(method, model, given)
    if method != METHOD and model != PROPOSER:
        return None
    if twice := sorted(given.keys() & options):
        raise SettingsError(
            f'tokentiming: "{twice[0]}" is given twice, in --speculative-config and by an option of its own; leave one '
            "out."
        )
    return given | options


def _refuse_early(
    settings: Mapping[str, Any],
    verification: str,
    target_model_config: Any,
    target_parallel_config: Any,
    num_speculative_tokens: int,
    engine_args: Any,
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
        raise SettingsError(f"tokentiming: {error}") from None
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
    from vllm_tokentiming.refusals import refuse_draft

    refuse_draft(parsed, num_speculative_tokens, engine_args, target_model_config, target_parallel_config)
