"""Top-k and top-p as they are defined, row by row; for tests of what shapes laws without vLLM."""

import torch


def truncate(logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """Logits `[n, size]`, with -inf for all but the `top_k` likeliest and the fewest that have `top_p` together."""
    kept = logits.clone()
    for row, values in enumerate(logits):
        size = len(values) if top_k is None else int(top_k[row])
        likeliest = values.argsort(descending=True, stable=True)
        kept[row, likeliest[size:]] = -torch.inf
        if top_p is not None:
            probs = kept[row].softmax(-1)[likeliest]
            enough = int((probs.cumsum(0) < top_p[row]).sum()) + 1
            kept[row, likeliest[enough:]] = -torch.inf
    return kept
