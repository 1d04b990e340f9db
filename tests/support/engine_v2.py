"""Starts engines on vLLM's model runner V2, or with the same settings on V1.

V2 runs under Triton's interpreter, in which a step takes tenths of a second: so tests write little. What is the same on
both runners (drafting, alignment, probabilities) is tested on V1.
"""

from __future__ import annotations

from typing import Any

import engine

MAX_LEN, MAX_TOKENS, FEW = 256, 8, 4


def start(draft: dict | None = None, **arguments) -> Any:
    """An engine with a draft, or alone if `draft` is `None`; on runner V2 if Triton's interpreter runs."""
    given = {"max_model_len": MAX_LEN, "max_num_seqs": FEW, "kernel_config": {"enable_jit_warmup": False}}
    speculative = {} if draft is None else {"speculative_config": engine.speculation(**draft)}
    return engine.start_exact(**{**given, **speculative, **arguments})
