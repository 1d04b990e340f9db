"""Tells whether two greedy texts that should be the same differ at a near tie only."""

from __future__ import annotations

from typing import Any

import engine

_FAR = 100.0  # Of a token that is not among the target's likeliest.


def gaps(plain: Any, other: Any, prompts: list[Any], max_tokens: int) -> list[float]:
    """How far apart two tokens are where the greedy texts of two engines first differ.

    Args:
        plain: A ``vllm.LLM`` that decodes plainly; its logits are what counts.
        other: Another one, with the same target.
        prompts: Texts, or lists of target ids.
        max_tokens: Of each output.

    Returns:
        For each prompt whose texts differ, the difference of the log-probabilities of the two tokens.
    """
    wanted = engine.greedy(max_tokens)
    found = []
    pairs = zip(engine.generate(plain, prompts, wanted), engine.generate(other, prompts, wanted), strict=True)
    for prompt, (left, right) in zip(prompts, pairs, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)
        if first is None:
            continue
        prompt_ids = prompt if isinstance(prompt, list) else plain.get_tokenizer().encode(prompt)
        asked = {"prompt_token_ids": prompt_ids + left[:first]}
        logprobs = plain.generate(asked, engine.greedy(1, logprobs=20), use_tqdm=False)[0].outputs[0].logprobs[0]
        likeliest = max(entry.logprob for entry in logprobs.values())
        chosen = logprobs.get(right[first])
        found.append(likeliest - chosen.logprob if chosen else _FAR)
    return found
