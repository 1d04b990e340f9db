"""The entry point ``vllm.general_plugins``: teaches vLLM the method ``tokentiming``.

vLLM calls ``register`` in every process, in the front end before the configuration is built. It prints nothing, may
be called any number of times, and changes nothing for engines that do not ask for us.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm_tokentiming import patches
from vllm_tokentiming.config import (
    ATTRIBUTE,
    METHOD,
    PROPOSER,
    SettingsError,
    TokenTimingConfig,
    check_verification,
    split_speculative_config,
)
from vllm_tokentiming.metrics import show_in_front_end

logger = logging.getLogger(f"vllm.{__name__}")


def register() -> None:
    """Let ``EngineArgs`` understand our method, and the scheduler tell workers the salts of requests.

    vLLM runs this in the engines of all users, so it raises nothing: on a vLLM that we cannot teach our method, vLLM
    refuses it to those who ask for it, and an unknown salt only means that nothing is shared.
    """
    for teach in (_teach_method, _teach_salts):
        try:
            teach()
        except Exception:
            logger.exception("TokenTiming cannot be used with this vLLM.")


def _teach_method() -> None:
    from vllm.engine.arg_utils import EngineArgs

    patches.install(
        EngineArgs, "create_speculative_config", _create_speculative_config, instead=_stop_if_asked_for,
        since="0.32.0, 0.33.0 (SpeculativeConfig refuses methods that it does not know)",
        until="a plugin may register a method",
    )  # fmt: skip


def _teach_salts() -> None:
    from vllm_tokentiming.compat import carry_cache_salts

    carry_cache_salts()


def _asked_for(engine_args: Any) -> bool:
    given = engine_args.speculative_config
    given = given if isinstance(given, Mapping) else {}
    method = getattr(engine_args, "spec_method", None) or given.get("method")
    return bool(method == METHOD or given.get("model") == PROPOSER)


def _stop_if_asked_for(original: Any, fault: Exception, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    if _asked_for(engine_args):
        raise fault
    return original(engine_args, *args, **kwargs)


def _create_speculative_config(
    original: Any, engine_args: Any, target_model_config: Any, target_parallel_config: Any
) -> Any:
    if not _asked_for(engine_args):
        return original(engine_args, target_model_config, target_parallel_config)
    given = {key.replace("-", "_"): value for key, value in (engine_args.speculative_config or {}).items()}
    # vLLM's shorthand options for the same three keys.
    for option, key in (
        ("spec_method", "method"),
        ("spec_model", "model"),
        ("spec_tokens", "num_speculative_tokens"),
    ):
        if getattr(engine_args, option, None) is not None:
            given[key] = getattr(engine_args, option)
            setattr(engine_args, option, None)
    if given.get("method") == METHOD:
        vllm_part, settings = split_speculative_config(given)
        if METHOD in engine_args.additional_config:
            raise SettingsError(
                'tokentiming: give the settings either in --speculative-config (method "tokentiming") or in '
                f'--additional-config (method "custom_class", model "{PROPOSER}"), not in both.'
            )
    else:
        vllm_part = given
        settings = engine_args.additional_config.get(METHOD, getattr(engine_args, ATTRIBUTE, {}))
    verification = vllm_part.get("rejection_sample_method", "standard")
    _refuse_early(settings, verification, target_model_config, target_parallel_config)
    show_in_front_end(target_parallel_config.data_parallel_size)
    engine_args.speculative_config = vllm_part
    created = original(engine_args, target_model_config, target_parallel_config)
    # vLLM compiles anew whenever anything in `additional_config` changes, and our settings change no graph.
    others = {key: value for key, value in engine_args.additional_config.items() if key != METHOD}
    engine_args.additional_config = others
    setattr(created, ATTRIBUTE, settings)
    setattr(engine_args, ATTRIBUTE, settings)  # vLLM may ask for the configuration of the same arguments again.
    return created


def _refuse_early(
    settings: dict[str, Any], verification: str, target_model_config: Any, target_parallel_config: Any
) -> None:
    """Find out in the front end, before any model is loaded, what would stop a worker.

    Raises:
        SettingsError: Something would.
    """
    parsed = TokenTimingConfig.parse(settings)
    check_verification(verification, parsed)
    try:
        import vllm_tokentiming.alignment  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"tokentiming: {error}") from error
    from vllm_tokentiming.requirements import check_vllm

    check_vllm()
    patches.check()
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
