"""The entry point ``vllm.general_plugins``: teaches vLLM the method ``tokentiming``.

vLLM calls ``register`` in every process, in the front end before the configuration is built. It prints nothing, may
be called any number of times, and changes nothing for engines that do not ask for us.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm_tokentiming.config import (
    ATTRIBUTE,
    METHOD,
    PROPOSER,
    VERIFICATIONS,
    SettingsError,
    TokenTimingConfig,
    check_num_speculative_tokens,
    check_verification,
    refuse_misnamed,
    settings_in,
    split_speculative_config,
)
from vllm_tokentiming.vllm import patches
from vllm_tokentiming.vllm.metrics import show_in_front_end

logger = logging.getLogger(f"vllm.{__name__}")

# vLLM's shorthand options, and what they stand for in the speculative configuration.
_OPTIONS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}


def register() -> None:
    """Let ``EngineArgs`` understand our method, requests their settings, and workers the salts of requests.

    vLLM runs this in the engines of all users, so it raises nothing: on a vLLM that we cannot teach our method, vLLM
    refuses it to those who ask for it, and an unknown salt only means that nothing is shared.
    """
    for teach in (_teach_method, _teach_salts, _teach_requests, _teach_runner):
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
    from vllm_tokentiming.vllm.compat import carry_cache_salts

    carry_cache_salts()


def _teach_requests() -> None:
    from vllm_tokentiming.vllm import request_settings

    request_settings.install()


def _teach_runner() -> None:
    from vllm_tokentiming.vllm import runner_choice

    runner_choice.install()


def _create_speculative_config(
    original: Any, engine_args: Any, target_model_config: Any, target_parallel_config: Any
) -> Any:
    given = _asked_for(engine_args)
    if given is None:
        return original(engine_args, target_model_config, target_parallel_config)
    vllm_part, settings = _split(given, engine_args)
    verification = str(vllm_part.setdefault("rejection_sample_method", VERIFICATIONS[0]))
    number = vllm_part["num_speculative_tokens"]
    _refuse_early(settings, verification, target_model_config, target_parallel_config, number, engine_args)
    show_in_front_end(target_parallel_config.data_parallel_size)
    # Scheduled asynchronously, each request verifies as many tokens as there can be proposals in every step, also while
    # drafting pauses since it would not pay. So that is for those who ask for it.
    if engine_args.async_scheduling is None:
        engine_args.async_scheduling = False
    # Only now, so that what was refused can be mended and tried again.
    engine_args.speculative_config = vllm_part
    for option in _OPTIONS:
        if hasattr(engine_args, option):
            setattr(engine_args, option, None)
    created = original(engine_args, target_model_config, target_parallel_config)
    # vLLM compiles anew whenever anything in `additional_config` changes, and our settings change no graph.
    additional = engine_args.additional_config
    if isinstance(additional, Mapping) and METHOD in additional:
        engine_args.additional_config = {key: value for key, value in additional.items() if key != METHOD}
    setattr(created, ATTRIBUTE, dict(settings))
    setattr(engine_args, ATTRIBUTE, dict(settings))  # vLLM may ask for the configuration again.
    return created


def _split(given: dict[str, Any], engine_args: Any) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Divide a speculative configuration into vLLM's part and our settings.

    Raises:
        SettingsError: They are given twice, not at all, or cannot be read.
    """
    additional = engine_args.additional_config
    if given.get("method") != METHOD:
        check_num_speculative_tokens(given.get("num_speculative_tokens"))
        known = getattr(engine_args, ATTRIBUTE, None)
        return given, settings_in(additional) if known is None else known
    if not (isinstance(additional, Mapping) or hasattr(additional, "compute_hash")):
        raise SettingsError(f"tokentiming: --additional-config is {additional!r}; write a dictionary or leave it out.")
    if isinstance(additional, Mapping) and METHOD in additional:
        raise SettingsError(
            'tokentiming: give the settings either in --speculative-config (method "tokentiming") or in '
            f'--additional-config (method "custom_class", model "{PROPOSER}"), not in both.'
        )
    return split_speculative_config(given)


def _asked_for(engine_args: Any) -> dict[str, Any] | None:
    """Return the speculative configuration with vLLM's shorthand options; ``None`` if it is not for us.

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


def _stop_if_asked_for(original: Any, fault: Exception, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Stop, after a fault of ours, the start of those who ask for us, and of nobody else."""
    if _asked_for(engine_args) is not None:
        raise fault
    return original(engine_args, *args, **kwargs)


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
    check_verification(verification, parsed)
    try:
        import vllm_tokentiming.align.dtw  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"tokentiming: {error}") from None
    from vllm_tokentiming.vllm.requirements import check_vllm

    check_vllm()
    patches.check()
    from vllm_tokentiming.vllm.refusals import refuse_draft, refuse_target

    refuse_target(target_model_config, target_parallel_config)
    refuse_draft(parsed, num_speculative_tokens, engine_args, target_model_config, target_parallel_config)
