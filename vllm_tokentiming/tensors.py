"""What torch does not do as we need it: copies that do not wait, and sums in a fixed order."""

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


def add_at(sums: torch.Tensor, dim: int, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Add like ``Tensor.index_add_``, in the same order each time.

    On accelerators torch adds in whatever order threads come. Each rank of a model, and each batch that a request is
    in, would then round differently, now and then decide differently about a proposal, and write another text.

    Args:
        sums: What is added to.
        dim: The dimension that ``index`` is for.
        index: ``[n] int64``.
        values: As ``sums``, but ``n`` in ``dim``.

    Returns:
        ``sums``.
    """
    if sums.device.type == "cpu":  # It is so there.
        return sums.index_add_(dim, index, values)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return sums.index_add_(dim, index, values)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
