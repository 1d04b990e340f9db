"""Lossless speculative decoding in vLLM for models that do not share a vocabulary.

The name that vLLM is given is ``vllm_tokentiming.TokenTimingProposer``; everything else is imported from its module.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["TokenTimingProposer"]


def __getattr__(name: str) -> Any:
    # Lazily: the core is used without vLLM, and importing vLLM takes seconds.
    if name == "TokenTimingProposer":
        from vllm_tokentiming.vllm.runner_v1 import CustomClassProposer

        return CustomClassProposer
    raise AttributeError(name)
