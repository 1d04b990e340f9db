"""The state of a request, as a step of drafting gets it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_tokentiming.draft.sampling import DraftSampling


@dataclass(frozen=True)
class RequestSnapshot:
    """One request, as the target left it.

    Attributes:
        request_id: vLLM's id. It may be given to another request once this one has been released.
        target_ids: ``[>= num_target] int32``; prompt and output.
        num_target: How many of them are committed.
        max_proposals: Most target tokens to propose now; 0 while the target itself still reads the prompt.
        sampling: How the draft is to be drawn; ``None`` for a greedy request, or one whose proposals vLLM may cut by
            looking at them.
        greedy: Whether the target takes its likeliest tokens.
        reading: Whether the target still reads the prompt; the draft then reads along.
        reproducible: Whether what is proposed must not depend on what else runs.
        cache_salt: As in vLLM: only requests with the same one share what the draft has read; "" if the user gave
            none. ``None`` if it is not known; then nothing is shared.
        unread: First positions and ends of the ids in the prompt that stand for something other than text.
    """

    request_id: str
    target_ids: npt.NDArray[np.int32]
    num_target: int
    max_proposals: int
    sampling: DraftSampling | None = None
    greedy: bool = False
    reading: bool = False
    reproducible: bool = False
    cache_salt: str | None = None
    unread: tuple[tuple[int, int], ...] = ()
