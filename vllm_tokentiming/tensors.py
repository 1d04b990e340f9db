"""Numbers of the host's, for a computation on the draft's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(
    values: Sequence[int] | Sequence[float] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Copy numbers to a device without waiting for what it computes, as indexing by a list would.

    Args:
        values: The numbers.
        device: Where they go.
        dtype: Theirs; by default, as ``torch.tensor`` has it.

    Returns:
        Them, in the shape that they have.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
