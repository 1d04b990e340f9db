"""The probability of a proposal: the draft's distribution ``Q``, carried over to the target's vocabulary.

Rejection sampling is exact if each proposed token is distributed as the ``q`` that the verifier is given, conditional
on everything that decided about it before. So ``q`` is the distribution of the emitted target token when the draft
token is drawn from ``Q``:

- the first token of an emission: ``Q`` pushed through ``first``; what is missing to 1 is the probability that all bytes
  stay pending, and then the draw is a stage of a later proposal's verification (``verify/stages.py``);
- a later one: ``Q``, restricted to the draft tokens whose emission begins with what was already proposed and goes on,
  and renormalised;
- with bytes pending, the emissions are not in a table, so the candidates that ``Q`` was pruned to are pushed through
  the transducer one by one.

The proof stands in ``docs/theory.md``.
"""

from __future__ import annotations

import torch

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft.distribution import Candidates
from vllm_tokentiming.tensors import add_at, upload


class PushForward:
    """Computes proposal probabilities of one pair on one device."""

    def __init__(self, transducer: Transducer, draft_size: int, target_size: int, device: torch.device) -> None:
        """Put the transducer's table on the device.

        Args:
            transducer: The pair's transducer.
            draft_size: Columns of the draft's logits.
            target_size: Columns of the target's logits.
            device: Where the draft's logits are.
        """
        self._transducer = transducer
        self._target_size = target_size
        # A draft token that emits nothing has no probability, or is taken out, so it may be added to any target token.
        self._first = torch.from_numpy(transducer.first)[:draft_size].clamp(min=0).to(device)
        self._incomplete_ids = torch.from_numpy(transducer.waiting[transducer.waiting < draft_size]).to(device)
        self._device = device

    def first_rows(
        self, probs: torch.Tensor, has_incomplete: bool = False, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the distribution of the first emitted token, with nothing pending.

        Args:
            probs: ``Q``, ``[n, draft size]``; 0 for what must not be drafted.
            has_incomplete: Whether incomplete characters have a probability in it.
            out: ``[n, target size] float32``, all 0; overwritten with the result if given.

        Returns:
            ``[n, target size] float32``; what is missing to 1 stays pending.
        """
        q = probs.new_zeros(len(probs), self._target_size) if out is None else out
        return add_at(q, 1, self._first, probs.index_fill(1, self._incomplete_ids, 0) if has_incomplete else probs)

    def later_row(self, probs: torch.Tensor, emitted_ids: tuple[int, ...]) -> torch.Tensor:
        """Return the distribution of the next token of an emission that began with ``emitted_ids``, nothing pending.

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

    def _row(self, target_ids: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        q = torch.zeros(self._target_size, dtype=torch.float32, device=mass.device)
        return add_at(q, 0, target_ids, mass.float()).div_(mass.sum())
