"""Exact probability transfer: the draft's law, carried over to the target's vocabulary.

Rejection sampling is exact if each proposed token is distributed as the ``q`` that the verifier is given, conditional
on everything that decided about it before. So ``q`` is the law of the emitted target token when the draft token is
drawn from ``Q``:

- the first token of an emission: ``Q`` pushed through ``first``; what is missing to 1 is the probability that all bytes
  wait, and then the draw is a stage of a later proposal's verification (``verify.py``). Where that is unlikely, such
  draft tokens are not drawn at all;
- a later one: ``Q``, restricted to the draft tokens whose emission begins with what was already proposed and goes on,
  and renormalised;
- with bytes pending, the emissions are not in a table; the draft token is then drawn from the ``CANDIDATES`` likeliest,
  and those are pushed through the transducer one by one.

The proof stands in ``docs/theory.md``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.transfer.stages import Groups, Stage

CANDIDATES = 64
RARE = 0.05  # Probability of waiting, below which it is not worth a stage.


@dataclass(frozen=True)
class Candidates:
    """The draft tokens that may be drawn with bytes pending.

    Attributes:
        pending: The bytes.
        draft_ids: The draft tokens.
        masses: The probability of each; they sum to 1.
        emissions: What each would emit, and leave pending.
    """

    pending: bytes
    draft_ids: list[int]
    masses: list[float]
    emissions: list[tuple[list[int], bytes]]

    def next_ids(self, emitted_ids: list[int]) -> tuple[list[int], list[float]]:
        """Return the next target ids of the draft tokens that emit ``emitted_ids`` and more, with probabilities."""
        depth = len(emitted_ids)
        alike = [
            (emitted[depth], mass)
            for (emitted, _), mass in zip(self.emissions, self.masses, strict=True)
            if len(emitted) > depth and emitted[:depth] == emitted_ids
        ]
        next_ids, masses = zip(*alike, strict=True)
        return list(next_ids), list(masses)


class Transfer:
    """Computes proposal probabilities of one pair on one device."""

    def __init__(self, transducer: Transducer, draft_size: int, target_size: int, device: torch.device) -> None:
        """Put the transducer's table on the device.

        Args:
            transducer: Of the pair.
            draft_size: Columns of the draft's logits.
            target_size: Columns of the target's logits.
            device: Where the draft's logits are.
        """
        self._transducer = transducer
        self._target_size = target_size
        first = torch.from_numpy(transducer.first)[:draft_size]
        # What emits nothing has no probability, or is taken out, so it may be added to any target token.
        self._first = first.clamp(min=0).to(device)
        # What each draft token is drafted for: its first target token, or, if it emits none yet, itself.
        aims = torch.where(first < 0, -1 - torch.arange(len(first)), first)
        self._pools = len(aims.unique()) < len(aims)  # Not so if both vocabularies are the same.
        self._aims = aims.to(device)
        self._device = device
        self._groups: dict[int, Groups] = {}
        have = transducer.waiting < draft_size
        self.waiting = torch.from_numpy(transducer.waiting[have]).to(device)
        names = {pending: group for group, pending in enumerate(transducer.waits(b"").pending)}
        groups = [names[pending] for pending in transducer.left_waiting]
        self._waiting_groups = torch.tensor(groups, dtype=torch.int64)[torch.from_numpy(have)].to(device)

    def drop_rare_waits(self, probs: torch.Tensor) -> torch.Tensor:
        """Take the tokens that all wait out of laws in which they are unlikely together.

        Args:
            probs: ``Q``, ``[n, draft size]``, of draws with nothing pending; overwritten.

        Returns:
            ``[n] bool``: whether such tokens may be drawn.
        """
        mass = probs[:, self.waiting]
        total = mass.sum(-1, keepdim=True)
        waits = total >= RARE
        probs.index_copy_(1, self.waiting, mass * waits)
        probs /= torch.where(waits, 1, 1 - total)
        return waits.squeeze(1)

    def first_rows(self, probs: torch.Tensor, waits: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the law of the first emitted token, with nothing pending.

        Args:
            probs: ``Q``, ``[n, draft size]``; 0 for what must not be drafted.
            waits: Whether tokens that all wait have a probability in it.
            out: ``[n, target size] float32``, all 0; overwritten with the result if given.

        Returns:
            ``[n, target size] float32``; what is missing to 1 waits.
        """
        q = probs.new_zeros(len(probs), self._target_size) if out is None else out
        return q.index_add_(1, self._first, probs.index_fill(1, self.waiting, 0) if waits else probs)

    def likeliest(self, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the draft token to write if the likeliest target token is to be proposed.

        A target token is as likely as the draft tokens together that emit it first, and among those the likeliest is
        written. One that emits nothing yet stands for itself alone: it is not known what it will be a part of. Only the
        likeliest ``CANDIDATES`` are looked at; all others would hardly tip the scales.

        Args:
            probs: ``Q``, ``[n, draft size]``; 0 for what must not be drafted.

        Returns:
            Those probabilities ``[n]``, and draft ids ``[n]``.
        """
        if not self._pools:
            confidences, next_ids = probs.max(-1)
            return confidences, next_ids
        masses, draft_ids = probs.topk(min(CANDIDATES, probs.shape[1]))  # The likeliest first.
        aims = self._aims[draft_ids]
        # Each with the less likely ones of the same aim, so that of all these the likeliest has the most.
        alike = (aims.unsqueeze(2) == aims.unsqueeze(1)).triu()
        confidences, best = (alike.float() @ masses.unsqueeze(2)).squeeze(2).max(-1, keepdim=True)
        return confidences.squeeze(1), draft_ids.gather(1, best).squeeze(1)

    def later_row(self, probs: torch.Tensor, emitted_ids: tuple[int, ...]) -> torch.Tensor:
        """Return the law of the next token of an emission that began with ``emitted_ids``, with nothing pending.

        Args:
            probs: ``Q``, ``[draft size]``.
            emitted_ids: The target tokens that it has emitted.

        Returns:
            ``[target size] float32``.
        """
        draft_ids, next_ids = self._transducer.alternatives(emitted_ids)
        mass = probs[torch.from_numpy(draft_ids).to(self._device, non_blocking=True)]
        return self._row(torch.from_numpy(next_ids).to(self._device, non_blocking=True), mass)

    def later_candidate_row(self, candidates: Candidates, emitted_ids: list[int]) -> torch.Tensor:
        """Do the same with bytes pending."""
        next_ids, masses = candidates.next_ids(emitted_ids)
        return self._row(upload(next_ids, self._device), upload(masses, self._device))

    def first_stage(self, probs: torch.Tensor, at_once: torch.Tensor, left: bytes | None, uniform: float) -> Stage:
        """Return the stage of a draw with nothing pending.

        Args:
            probs: ``Q``, ``[draft size]``.
            at_once: Its row of ``first_rows``.
            left: What the drawn token left waiting; ``None`` if it committed.
            uniform: See ``Stage``.
        """
        groups = self._groups_of(b"")
        waiting = torch.zeros(groups.number, device=probs.device).index_add_(
            0, self._waiting_groups, probs[self.waiting]
        )
        return Stage(groups, at_once, waiting, self._group(b"", left), uniform)

    def later_stage(self, candidates: Candidates, at_once: torch.Tensor, left: bytes | None, uniform: float) -> Stage:
        """Return the stage of a draw with bytes pending; see ``first_stage``.

        Args:
            candidates: What could have been drawn.
            at_once: ``[target size] float32``, all 0; overwritten with how likely each target token was committed.
            left: See there.
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

    def candidates(self, probs: torch.Tensor, pending: Sequence[bytes]) -> list[Candidates]:
        """Return the draft tokens that may be drawn with bytes pending: the likeliest.

        Those that commit at once what the draft spells by waiting are left out: it would be rejected.

        Args:
            probs: ``Q`` before that, ``[n, draft size]``.
            pending: The bytes, ``[n]``.
        """
        likeliest = probs.topk(min(CANDIDATES, probs.shape[1]))
        # In one go; see `Writer.advance`.
        masses, draft_ids = torch.stack([likeliest.values, likeliest.indices.to(probs.dtype)]).tolist()
        return [self._candidates(*row) for row in zip(pending, masses, draft_ids, strict=True)]

    def _candidates(self, pending: bytes, masses: list[float], draft_ids: list[float]) -> Candidates:
        # What each emits is found out one by one, so there must be few.
        emissions = [self._transducer.emit(pending, int(draft_id)) for draft_id in draft_ids]
        waited_for = set(self._transducer.waits(pending).target_ids.tolist())
        kept = [i for i, (emitted, _) in enumerate(emissions) if not emitted or emitted[0] not in waited_for]
        kept = [i for i in kept if masses[i] > 0] or list(range(len(masses)))
        total = sum(masses[i] for i in kept)
        return Candidates(
            pending, [int(draft_ids[i]) for i in kept], [masses[i] / total for i in kept], [emissions[i] for i in kept]
        )

    def any_of(self, stage: Stage, pending: bytes) -> int:
        """Return a target token to propose after a stage that was not followed by another one.

        Args:
            stage: It.
            pending: What it left waiting.
        """
        found = -1 if stage.drawn is None or stage.drawn < 0 else stage.groups.first_ids[stage.drawn]
        return found if found >= 0 else self._transducer.alone(pending)

    def paper_row(self, probs: torch.Tensor, draft_id: int, target_id: int) -> torch.Tensor:
        """Apply the published transfer (arXiv 2510.15545): **not exact**, for comparison only.

        The aligned draft token's probability goes to the proxy token, the others' to what they would emit alone. The
        proxy token came out of the whole drafted text, so this is not the law that it was drawn from.

        Args:
            probs: ``Q``, ``[draft size]``, that the aligned draft token was drawn from.
            draft_id: That token.
            target_id: The proxy token.

        Returns:
            ``[target size] float32``.
        """
        q = self.first_rows(probs.index_fill(0, torch.tensor([draft_id], device=probs.device), 0).unsqueeze(0))[0]
        mass = float(probs[draft_id])
        q *= (1 - mass) / q.sum().clamp(min=1e-30)
        q[target_id] += mass
        return q

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

    def _row(self, target_ids: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        q = torch.zeros(self._target_size, dtype=torch.float32, device=mass.device)
        return q.index_add_(0, target_ids, mass.float()).div_(mass.sum())
