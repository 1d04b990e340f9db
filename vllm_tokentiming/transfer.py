"""Exact probability transfer: the draft's law, carried over to the target's vocabulary.

Rejection sampling is exact if each proposed token is distributed as the ``q`` that the verifier is given, conditional
on everything that decided about it before. So ``q`` is the law of the emitted target token when the draft token is
drawn from ``Q``:

- the first token of an emission: ``Q``, restricted to the draft tokens that emit anything, pushed through ``first``;
- a later one: ``Q``, restricted to the draft tokens whose emission begins with what was already proposed and goes on;
- with bytes pending, the emissions are not in a table; the draft token is then drawn from the ``CANDIDATES`` likeliest,
  and those are pushed through the transducer one by one.

Each is renormalised. The proof stands in ``docs/theory.md``.
"""

from __future__ import annotations

import torch

from vllm_tokentiming.transducer import Transducer

CANDIDATES = 64


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
        emitting = (first >= 0).nonzero().squeeze(1)
        self._emitting = emitting.to(device)
        self._first = first[emitting].to(device)

    def first_rows(self, probs: torch.Tensor) -> torch.Tensor:
        """The law of the first emitted token, with nothing pending.

        Args:
            probs: ``Q``, ``[n, draft size]``.

        Returns:
            ``[n, target size] float32``.
        """
        q = probs.new_zeros(len(probs), self._target_size)
        mass = probs[:, self._emitting]
        return q.index_add_(1, self._first, mass).div_(mass.sum(-1, keepdim=True))

    def later_row(self, probs: torch.Tensor, emitted_ids: tuple[int, ...]) -> torch.Tensor:
        """The law of the next token of an emission that began with ``emitted_ids``, with nothing pending.

        Args:
            probs: ``Q``, ``[draft size]``.
            emitted_ids: The target tokens that it has emitted.

        Returns:
            ``[target size] float32``.
        """
        draft_ids, next_ids = self._transducer.alternatives(emitted_ids)
        mass = probs[torch.from_numpy(draft_ids).to(probs.device)]
        return self._row(torch.from_numpy(next_ids).to(probs.device), mass)

    def candidate_rows(self, candidates: dict[int, float], pending: bytes, target_ids: list[int]) -> list[torch.Tensor]:
        """The laws of an emission's tokens, with bytes pending.

        Args:
            candidates: ``Q``: every draft id that could have been drawn, and its probability.
            pending: The bytes.
            target_ids: What the drawn token emitted.

        Returns:
            One row ``[target size] float32``, on the host, for each of ``target_ids``.
        """
        emissions = [(self._transducer.emit(pending, d)[0], mass) for d, mass in candidates.items()]
        rows = []
        for depth in range(len(target_ids)):
            alike = [(e[depth], mass) for e, mass in emissions if len(e) > depth and e[:depth] == target_ids[:depth]]
            next_ids, masses = zip(*alike, strict=True)
            rows.append(self._row(torch.tensor(next_ids), torch.tensor(masses, dtype=torch.float32)))
        return rows

    def paper_row(self, probs: torch.Tensor, draft_id: int, target_id: int) -> torch.Tensor:
        """The published transfer (arXiv 2510.15545): **not exact**, for comparison only.

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
        q = q.nan_to_num_(0) * (1 - mass)
        q[target_id] += mass
        return q

    def _row(self, target_ids: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        q = torch.zeros(self._target_size, dtype=torch.float32, device=mass.device)
        return q.index_add_(0, target_ids, mass.float()).div_(mass.sum())
