"""The draws of a draft that a proposal came from, where a target token is spelled in several.

``verify.py`` verifies them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_tokentiming.align.transducer import Waits


@dataclass(frozen=True)
class Groups:
    """``Waits`` on a device.

    Attributes:
        number: Of groups.
        target_ids: ``[n] int64``; see there.
        groups: ``[n] int64``; see there.
        first_ids: The first target id of each group, -1 if it has none.
    """

    number: int
    target_ids: torch.Tensor
    groups: torch.Tensor
    first_ids: tuple[int, ...]

    @classmethod
    def of(cls, waits: Waits, device: torch.device) -> Groups:
        """Copy them there."""
        first_ids = [-1] * len(waits.pending)
        for target_id, group in zip(waits.target_ids[::-1].tolist(), waits.groups[::-1].tolist(), strict=True):
            first_ids[group] = target_id
        columns = (torch.from_numpy(column) for column in (waits.target_ids, waits.groups))
        target_ids, groups = (column.to(device, non_blocking=True) for column in columns)
        return cls(len(waits.pending), target_ids, groups, tuple(first_ids))


@dataclass(frozen=True)
class Stage:
    """One draw of the draft, as to what it meant for the target.

    Attributes:
        groups: What the target tokens would be that are waited for.
        at_once: ``[target size] float32``; how likely the draw was to commit each target token at once.
        waiting: ``[groups.number] float32``; how likely it was to wait for those of each group.
        drawn: The group that it went on to wait for, -1 for one that no target token is in; ``None`` if it committed.
        uniform: Random number in [0, 1) of this stage's verification.
    """

    groups: Groups
    at_once: torch.Tensor
    waiting: torch.Tensor
    drawn: int | None = None
    uniform: float = 0.0
