"""What a user may set for one request, in ``SamplingParams.extra_args``: ``{"tokentiming": {"max_proposals": 0}}``.

vLLM's server takes texts and numbers there (``vllm_xargs``) and no dictionaries, so ours may be written as JSON text,
too. vLLM lets nobody but itself look at the parameters of a request before it is accepted, so its ``verify`` is ours:
there a wrong value is refused. In the worker, where nobody could be told, a wrong value counts as not given.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

from vllm_tokentiming.config import ATTRIBUTE, METHOD, SettingsError
from vllm_tokentiming.vllm import patches

_MAX_PROPOSALS = "max_proposals"


def max_proposals(extra_args: Any, most: float = math.inf) -> int | None:
    """Return the most target tokens that a user wants to be proposed for a request in a step.

    Args:
        extra_args: Of the request's parameters.
        most: ``num_speculative_tokens``, if it is known.

    Returns:
        The number, ``None`` if it is not given.

    Raises:
        SettingsError: Something else is given.
    """
    if not isinstance(extra_args, Mapping) or METHOD not in extra_args:
        return None
    given = extra_args[METHOD]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = extra_args[METHOD]
    if not isinstance(given, Mapping):
        raise SettingsError(
            f'tokentiming: "{METHOD}" in extra_args (vllm_xargs) is {given!r}; write a dictionary, or the same as JSON '
            f'text: {{"{_MAX_PROPOSALS}": 0}}.'
        )
    if unknown := [key for key in given if key != _MAX_PROPOSALS]:
        raise SettingsError(
            f'tokentiming does not know the setting {unknown[0]!r} of a request; it knows "{_MAX_PROPOSALS}".'
        )
    number = given.get(_MAX_PROPOSALS)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
        highest = "" if most == math.inf else f" to {most}, which is num_speculative_tokens"
        raise SettingsError(
            f'tokentiming: "{_MAX_PROPOSALS}" of a request is {number!r}; write a whole number from 0{highest}.'
        )
    return number


def install() -> None:
    """Have vLLM refuse wrong values. Can be called any number of times."""
    from vllm.sampling_params import SamplingParams

    patches.install(
        SamplingParams, "verify", _verify,
        since="0.32.0, 0.33.0", until="a plugin may check the parameters of requests",
    )  # fmt: skip


@functools.cache
def _parameters_of_verify() -> inspect.Signature:
    from vllm.sampling_params import SamplingParams

    return inspect.signature(SamplingParams.verify)


@functools.cache
def _request_error() -> type[SettingsError]:
    """Return the class of our errors that vLLM's server takes for mistakes in a request."""
    from vllm.exceptions import VLLMValidationError

    class RequestError(VLLMValidationError, SettingsError):  # type: ignore[misc]  # `Any` to mypy.
        """A wrong setting of a request."""

    return RequestError


def _verify(verify: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
    verified = verify(parameters, *args, **kwargs)
    if parameters.extra_args and METHOD in parameters.extra_args:
        call = _parameters_of_verify().bind(parameters, *args, **kwargs).arguments
        speculative = call["speculative_config"]
        if getattr(speculative, ATTRIBUTE, None) is not None:
            try:
                max_proposals(parameters.extra_args, speculative.num_speculative_tokens)
            except SettingsError as error:
                raise _request_error()(str(error)) from None
    return verified
