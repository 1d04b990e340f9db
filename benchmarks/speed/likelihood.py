"""How likely sampled outputs are under the target: a check, inside every run, that a method samples what it says.

Lossless methods write what the target would write, so the mean log-likelihood of their outputs is plain decoding's. An
equal mean does not prove losslessness (`exactness.py` measures that), but another mean disproves it.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@functools.cache
def _load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def log_likelihoods(target: Path, prompts: list[str], target_ids: list[list[int]], temperature: float) -> list[float]:
    """Score outputs.

    Args:
        target: Folder of the target; the trained one, as a widened one has the same law.
        prompts: What they follow.
        target_ids: The outputs, one for each prompt.
        temperature: Above 0.

    Returns:
        For each output, nats for a token.
    """
    model, tokenizer = _load(target)
    scores = []
    for prompt, written in zip(prompts, target_ids, strict=True):
        read = tokenizer(prompt).input_ids
        logits = model(torch.tensor([[*read, *written]])).logits[0, len(read) - 1 : -1]
        law = (logits / temperature).log_softmax(-1)
        scores.append(float(law[range(len(written)), written].mean()))
    return scores
