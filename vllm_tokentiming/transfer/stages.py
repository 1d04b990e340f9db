"""The draws of a draft that a proposal came from, where a target token is spelled in several.

``verify/stages.py`` verifies them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from vllm_tokentiming.align.transducer import Transducer, Waits
from vllm_tokentiming.draft.distribution import Candidates
from vllm_tokentiming.tensors import add_at, upload


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


class StageBuilder:
    """Makes the stages of one pair's draws on one device."""

    def __init__(self, transducer: Transducer, draft_size: int, device: torch.device) -> None:
        """Put the incomplete characters and their groups on the device.

        Args:
            transducer: The pair's transducer.
            draft_size: Columns of the draft's logits.
            device: Where the draft's logits are.
        """
        self._transducer = transducer
        self._device = device
        self._groups: dict[int, Groups] = {}
        have = transducer.waiting < draft_size
        self._incomplete_ids = torch.from_numpy(transducer.waiting[have]).to(device)
        names = {pending: group for group, pending in enumerate(transducer.waits(b"").pending)}
        groups = [names[pending] for pending in transducer.left_waiting]
        self._incomplete_groups = torch.tensor(groups, dtype=torch.int64)[torch.from_numpy(have)].to(device)

    def first_stage(self, probs: torch.Tensor, at_once: torch.Tensor, left: bytes | None, uniform: float) -> Stage:
        """Return the stage of a draw with nothing pending.

        Args:
            probs: ``Q``, ``[draft size]``.
            at_once: Its row of ``PushForward.first_rows``.
            left: The bytes that the drawn token left pending; ``None`` if it committed.
            uniform: See ``Stage``.
        """
        groups = self._groups_of(b"")
        waiting = torch.zeros(groups.number, device=probs.device)
        add_at(waiting, 0, self._incomplete_groups, probs[self._incomplete_ids])
        return Stage(groups, at_once, waiting, self._group(b"", left), uniform)

    def later_stage(self, candidates: Candidates, at_once: torch.Tensor, left: bytes | None, uniform: float) -> Stage:
        """Return the stage of a draw with bytes pending; see ``first_stage``.

        Args:
            candidates: The draft tokens that could have been drawn.
            at_once: ``[target size] float32``, all 0; overwritten with how likely each target token was committed.
            left: See ``first_stage``.
            uniform: See ``Stage``.
        """
        groups = self._groups_of(candidates.pending)
        waiting = [0.0] * groups.number
        mass_of: defaultdict[int, float] = defaultdict(float)
        for (emitted, then), mass in zip(candidates.emissions, candidates.masses, strict=True):
            if emitted:
                mass_of[emitted[0]] += mass
            elif (group := self._group(candidates.pending, then)) is not None and group >= 0:
                waiting[group] += mass
        committed_ids = upload(list(mass_of), self._device, torch.int64)
        at_once[committed_ids] = upload(list(mass_of.values()), self._device, torch.float32)
        drawn = self._group(candidates.pending, left)
        return Stage(groups, at_once, upload(waiting, self._device), drawn, uniform)

    def any_of(self, stage: Stage, pending: bytes) -> int:
        """Return a target token to propose after a stage that no other one followed.

        Args:
            stage: The stage.
            pending: The bytes that it left pending.
        """
        found = -1 if stage.drawn is None or stage.drawn < 0 else stage.groups.first_ids[stage.drawn]
        return found if found >= 0 else self._transducer.alone(pending)

    def _groups_of(self, pending: bytes) -> Groups:
        # By what is waited for, of which there is a limited number; most bytes that can be pending have no entry there.
        waits = self._transducer.waits(pending)
        groups = self._groups.get(id(waits))
        if groups is None:
            groups = self._groups[id(waits)] = Groups.of(waits, self._device)
        return groups

    def _group(self, pending: bytes, left: bytes | None) -> int | None:
        if left is None:
            return None
        names = self._transducer.waits(pending).pending
        return names.index(left) if left in names else -1
