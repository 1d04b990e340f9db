"""What both model runners know of a request, and what drafting needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_tokentiming.config import SettingsError
from vllm_tokentiming.draft.batch import RequestSnapshot
from vllm_tokentiming.draft.sampling import DraftSampling, seed_of
from vllm_tokentiming.vllm.request_settings import max_proposals

_GREEDY_BELOW = 1e-5  # vLLM's `_SAMPLING_EPS`


@dataclass(frozen=True)
class KnownRequest:
    """What stays the same while a request lives.

    Attributes:
        request_id: vLLM's id.
        sampling: How its draft is drawn; ``None`` if its proposals are to be verified as one-hot.
        greedy: Whether the target takes its likeliest tokens.
        reproducible: Whether what is proposed must not depend on what else runs.
        cache_salt: Only requests with the same one share what the draft has read; ``None`` if it is not known.
        max_tokens: Most tokens of the request, prompt and output.
        unread: First positions and ends of the ids in the prompt that stand for something other than text.
        has_text: Whether the draft can read the prompt.
        max_proposals: Most target tokens that the user wants to be proposed in a step; ``None`` for no limit.
    """

    request_id: str
    sampling: DraftSampling | None
    greedy: bool
    reproducible: bool
    cache_salt: str | None
    max_tokens: int
    unread: tuple[tuple[int, int], ...]
    has_text: bool
    max_proposals: int | None = None

    def snapshot(
        self, target_ids: npt.NDArray[np.int32], num_target: int, *, reading: bool, max_proposals: int, max_len: int
    ) -> RequestSnapshot:
        """Describe the request as the target left it.

        Args:
            target_ids: ``[>= num_target] int32``; prompt and output.
            num_target: How many of them are committed.
            reading: Whether the target still reads the prompt.
            max_proposals: Most target tokens to propose for any request.
            max_len: Most target tokens of any request.
        """
        if self.max_proposals is not None:
            max_proposals = min(max_proposals, self.max_proposals)
        if not self.has_text or self.max_proposals == 0:
            num_target = 0  # Nothing is read for what is not drafted.
        most = 0
        if num_target and not reading:
            most = min(max_proposals, min(max_len, self.max_tokens) - num_target - 1)
        return RequestSnapshot(
            self.request_id,
            target_ids,
            num_target,
            max(most, 0),
            self.sampling,
            greedy=self.greedy,
            reading=reading,
            reproducible=self.reproducible,
            cache_salt=self.cache_salt,
            unread=self.unread,
        )


def known_request(
    request_id: str, request: Any, *, num_prompt_tokens: int, cache_salt: str | None, draft_seed: int
) -> KnownRequest:
    """Collect what stays the same while a request lives.

    Args:
        request_id: vLLM's id.
        request: vLLM's ``CachedRequestState`` (runner V1) or ``NewRequestData`` (runner V2), which name these alike.
        num_prompt_tokens: Length of the prompt.
        cache_salt: The user's; "" if there is none, ``None`` if it is not known.
        draft_seed: Our setting, the seed of requests without one.
    """
    parameters = request.sampling_params
    greedy = parameters.temperature < _GREEDY_BELOW
    return KnownRequest(
        request_id,
        _sampling(request_id, parameters, draft_seed),
        greedy=greedy,
        # A greedy request writes the same text whatever is proposed.
        reproducible=parameters.seed is not None and not greedy,
        cache_salt=cache_salt,
        max_tokens=num_prompt_tokens + parameters.max_tokens,
        unread=_placeholders(request.mm_features),
        has_text=request.prompt_embeds is None,  # Otherwise there are no prompt tokens that the draft could read.
        max_proposals=_max_proposals(parameters.extra_args),
    )


def _max_proposals(extra_args: Any) -> int | None:
    try:
        return max_proposals(extra_args)
    except SettingsError:  # The front end refuses it, where our entry point runs there.
        return None


def _placeholders(features: Any) -> tuple[tuple[int, int], ...]:
    """Where a prompt has an image, audio or a video: by position, since the ids there mean something in no text."""
    ranges = (feature.mm_position for feature in features or ())
    return tuple(sorted((place.offset, place.offset + place.length) for place in ranges))


def _sampling(request_id: str, parameters: Any, draft_seed: int) -> DraftSampling | None:
    """How to draw a request's draft; ``None`` if its proposals are to be verified as one-hot."""
    # vLLM cuts proposals at the first token that the grammar forbids: a choice that looks at the tokens.
    if parameters.temperature < _GREEDY_BELOW or parameters.structured_outputs is not None:
        return None
    return DraftSampling(
        seed_of(request_id, parameters.seed, draft_seed),
        parameters.temperature,
        max(parameters.top_k, 0),
        parameters.top_p,
        parameters.min_p,
    )
