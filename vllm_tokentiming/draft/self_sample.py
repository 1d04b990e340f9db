"""Text that the draft itself writes, as a sample of what it will be asked to write.

The alignment prior needs a sample of text in the languages that the models know. Nobody knows them better than the
draft, so it writes one when the engine starts: sampled at temperature 1, from a fixed seed, so that every start and
every rank has the same.
"""

from __future__ import annotations

import torch

from vllm_tokentiming.draft.distribution import draw
from vllm_tokentiming.draft.protocol import DraftModel, Span
from vllm_tokentiming.draft.sampling import uniforms
from vllm_tokentiming.vocab.pair import VocabularyPair

_NUM_TEXTS = 32
_NUM_TOKENS = 256


@torch.inference_mode()
def write_texts(model: DraftModel, pair: VocabularyPair) -> list[list[int]]:
    """Let the draft write.

    Args:
        model: The draft model; all of its KV pool is free again afterwards.
        pair: The vocabularies.

    Returns:
        Texts in draft ids, ordinary tokens only.
    """
    num_tokens = min(_NUM_TOKENS, model.max_model_len)
    rows: list[int] = []
    while len(rows) < min(_NUM_TEXTS, model.max_batch_tokens) and (row := model.pool.open_row()) is not None:
        rows.append(row)
        if not model.pool.grow(row, num_tokens):
            model.pool.close_row(rows.pop())
            break
    ordinary = torch.zeros(model.vocab_size, dtype=torch.bool)
    known = torch.from_numpy(pair.draft.token_bytes.lengths > 0)[: model.vocab_size]
    ordinary[: len(known)] = known
    never = (~ordinary).to(model.device)
    numbers = [uniforms(0, row, num_tokens) for row in range(len(rows))]
    texts: list[list[int]] = [[_first(pair)] for _ in rows]
    for position in range(num_tokens - 1):
        logits = model.forward([Span(row, position, text[-1:]) for row, text in zip(rows, texts, strict=True)])
        probs = logits.float().masked_fill_(never, float("-inf")).softmax(-1)
        for text, draft_id in zip(texts, draw(probs, [n[position] for n in numbers]).tolist(), strict=True):
            text.append(draft_id)
    for row in rows:
        model.pool.close_row(row)
    return [text[1:] for text in texts]


def _first(pair: VocabularyPair) -> int:
    return (pair.draft_prefix or pair.draft.encoder.encode(b"\n"))[-1]
