"""The draft's distribution ``Q``: everything that defines it, and the draws from it.

The draft's logits enter here and do not come back. ``Q`` is the draft's next-token distribution at the request's
temperature, times what has been learned (``learned_weights.py``), with the request's top-k, top-p and min-p, over the
ids that may be drafted.
Whatever shapes it here is part of its definition: a token is drawn from exactly the ``Q`` that is returned.

In this order:

- **Masking.** Ids that may not be drafted. In a draw with no bytes pending, also ids that the target cannot write, and
  incomplete characters unless the request allows them.
- **Shaping** (``shaping.py``). Temperature, learned weights, top-k, top-p, min-p.
- **Pruning.** Incomplete characters are left out where they are unlikely together, because each of them costs a stage
  of verification. With bytes pending, the draw is from the ``MAX_CANDIDATES`` likeliest ids: what each of them emits is
  in no table, so it is worked out one by one.
- **The choice.** A draw, or, for a request that does not draw, the greedy choice.

The proof that proposals may be drawn from such a ``Q`` stands in ``docs/theory.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft.learned_weights import LearnedWeights
from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.draft.shaping import LogWeights, Truncate, draw, shape
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.vocab.pair import VocabularyPair

MAX_CANDIDATES = 64
MIN_PENDING_PROBABILITY = 0.05  # Of all incomplete characters together. Below it, they are not worth a stage.
_ASCII_WINDOW = 8  # Draft tokens.


@dataclass(slots=True)
class DrawState:
    """The part of a request's state that its ``Q`` depends on, beside the logits.

    Attributes:
        sampling: How to draw; ``None`` for the greedy choice.
        allow_incomplete: Whether incomplete characters may be drawn with no bytes pending.
        uses_learned: Whether a draw is from a ``Q`` that learns. The greedy choice never is.
        pending: Bytes that have been drafted and emitted no target token yet.
        uniforms: A random number for each draw of the step.
        num_drawn: How many draws there have been in the step.
    """

    sampling: DraftSampling | None = None
    allow_incomplete: bool = True
    uses_learned: bool = False
    pending: bytes = b""
    uniforms: list[float] = field(default_factory=list)
    num_drawn: int = 0


@dataclass(frozen=True)
class Candidates:
    """The draft tokens that may be drawn with bytes pending.

    Attributes:
        pending: The bytes.
        draft_ids: The draft tokens.
        masses: The probability of each; they sum to 1.
        emissions: The target ids that each would emit, and the bytes that would be pending then.
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


@dataclass(slots=True)
class Choices:
    """One draft token for each request, and the distributions that the drawn ones came from.

    Attributes:
        draft_ids: The chosen token of each request.
        confidences: The highest probability of each request's ``Q``, or, for the greedy choice, the probability of
            what was chosen.
        sources: The row of ``draft_probs`` of each request; -1 for the greedy choice.
        is_stage: Whether each choice is a stage of verification, because bytes were pending or incomplete characters
            could be drawn.
        candidates: The candidates of each request with bytes pending, by its place.
        draft_probs: ``[draws, draft size] float32``, the ``Q`` of the requests that drew.
        has_incomplete: Whether incomplete characters have a probability in any row of ``draft_probs``.
    """

    draft_ids: list[int]
    confidences: list[float]
    sources: list[int]
    is_stage: list[bool]
    candidates: dict[int, Candidates]
    draft_probs: torch.Tensor
    has_incomplete: bool


class DraftDistribution:
    """Chooses draft tokens from the draft's logits, for one pair on one device."""

    def __init__(
        self,
        pair: VocabularyPair,
        transducer: Transducer,
        *,
        draft_size: int,
        device: torch.device,
        truncate: Truncate,
        for_target_tokens: bool,
        learned: LearnedWeights | None = None,
    ) -> None:
        """Put what is the same in every step on the device.

        Args:
            pair: The vocabularies.
            transducer: The pair's transducer; one to one for ``tli``.
            draft_size: Columns of the draft's logits.
            device: Where the draft's logits are.
            truncate: Cuts off what top-k and top-p leave out, as the target's sampler does.
            for_target_tokens: Whether ``Q`` is shaped for the target tokens that the transducer emits: the greedy
                choice is for the likeliest target token, incomplete characters are drawn in stages, and ids that the
                target cannot write are left out.
            learned: What has been learned; ``None`` if nothing is.
        """
        self._transducer = transducer
        self._device = device
        self._truncate = truncate
        self._learned = learned
        draftable = torch.zeros(draft_size, dtype=torch.bool)
        known = torch.from_numpy(transducer.draftable)[:draft_size]
        draftable[: len(known)] = known
        self._undraftable_ids = (~draftable).nonzero().squeeze(1).to(device)
        self._no_probs = torch.empty(0, draft_size, device=device)
        self._has_stages = for_target_tokens and len(transducer.waiting) > 0
        # With nothing pending, an id that the target cannot write says nothing about what comes next.
        unwritable = torch.from_numpy(transducer.lost if for_target_tokens else transducer.lost[:0])
        self._unwritable_ids = unwritable[unwritable < draft_size].to(device)
        incomplete = torch.from_numpy(transducer.waiting)
        self._incomplete_ids = incomplete[incomplete < draft_size].to(device)
        self._complete_only = torch.cat([self._undraftable_ids, self._unwritable_ids, self._incomplete_ids])
        self._is_wide = [not (data or b"").isascii() for data in pair.draft.token_bytes.pieces]
        # The first target token that each draft token emits. One that emits none yet has a label of its own.
        first = torch.from_numpy(transducer.first)[:draft_size]
        labels = torch.where(first < 0, -1 - torch.arange(len(first)), first)
        # Not so if both vocabularies are the same.
        self._adds_up = for_target_tokens and len(labels.unique()) < len(labels)
        self._labels = labels.to(device)

    def allows_incomplete(self, draft_ids: Sequence[int]) -> bool:
        """Return whether incomplete characters may be drawn after a context: not where all was ASCII lately.

        In such text they hardly ever are what comes, and every draw would have to be checked for them.
        """
        return any(self._is_wide[draft_id] for draft_id in draft_ids[-_ASCII_WINDOW:])

    def choose(self, logits: torch.Tensor, states: Sequence[DrawState]) -> Choices:
        """Choose one draft token for each request.

        Args:
            logits: ``[len(states), draft size]``; overwritten.
            states: The requests. Their draws are counted, and what they allow is brought up to date.

        Raises:
            FloatingPointError: The logits are no numbers.
        """
        number = len(states)
        drawing = [row for row, state in enumerate(states) if state.sampling]
        staging = bool(drawing) and self._has_stages and any(states[row].allow_incomplete for row in drawing)
        self._mask(logits, states, drawing, staging)
        candidates: dict[int, Candidates] = {}
        staged = None
        if len(drawing) == number:
            probs, next_ids, staged, candidates = self._draw(logits, states, staging)
            confidences = probs.amax(-1)
        else:
            confidences, next_ids = self._greedy(logits)
            probs = self._no_probs
            if drawing:
                rows = upload(drawing, self._device)
                probs, drawn, staged, found = self._draw(logits[rows], [states[row] for row in drawing], staging)
                next_ids[rows], confidences[rows] = drawn, probs.amax(-1)
                candidates = {drawing[source]: some for source, some in found.items()}
        # In one go: on an accelerator, every copy to the host waits for it. All as float32, which holds ids exactly.
        columns = [next_ids, confidences] if staged is None else [next_ids, confidences, staged]
        chosen = torch.cat(columns).tolist()
        confident = chosen[number : 2 * number]
        # Nothing may be verified with such a `q`.
        if math.isnan(sum(confident)):
            raise FloatingPointError("the draft's logits are not finite")
        draft_ids = list(map(int, chosen[:number]))
        sources, is_stage = [-1] * number, [False] * number
        for source, row in enumerate(drawing):
            sources[row] = source
            state = states[row]
            state.num_drawn += 1
            if self._is_wide[draft_ids[row]]:
                state.allow_incomplete = True
            if staged is not None:
                is_stage[row] = bool(chosen[2 * number + source])
        return Choices(draft_ids, confident, sources, is_stage, candidates, probs, staged is not None)

    def _mask(self, logits: torch.Tensor, states: Sequence[DrawState], drawing: list[int], staging: bool) -> None:
        """Rule out what must not be drafted, or drawn."""
        if self._has_stages and not staging and len(drawing) == len(states):
            logits.index_fill_(1, self._complete_only, float("-inf"))
            return
        logits.index_fill_(1, self._undraftable_ids, float("-inf"))
        if not drawing:
            return
        fresh = [row for row in drawing if not states[row].pending]
        complete = [row for row in fresh if self._has_stages and not states[row].allow_incomplete]
        for rows, draft_ids in ((fresh, self._unwritable_ids), (complete, self._incomplete_ids)):
            if rows and len(draft_ids):
                logits[upload(rows, self._device)[:, None], draft_ids] = float("-inf")

    def _draw(
        self, logits: torch.Tensor, states: Sequence[DrawState], staging: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[int, Candidates]]:
        """Shape and prune the distributions, and draw from them.

        Returns:
            The distributions ``[n, draft size]``, draft ids ``[n]``, whether each draw is a stage ``[n] bool`` or
            ``None`` if none is, and the candidates of the rows with bytes pending.
        """
        sampling = [state.sampling for state in states if state.sampling]
        probs = shape(logits, sampling, self._truncate, self._log_weights(states))
        uniforms = [state.uniforms[state.num_drawn] for state in states]
        pending = [row for row, state in enumerate(states) if state.pending]
        if not (staging or pending):
            return probs, draw(probs, uniforms), None, {}
        staged = upload([bool(state.pending) for state in states], self._device)
        if fresh := [
            row for row, state in enumerate(states) if staging and state.allow_incomplete and not state.pending
        ]:
            rows = upload(fresh, self._device)
            pruned = probs[rows]
            staged[rows] = self._drop_rare_incomplete(pruned)
            probs[rows] = pruned
        candidates: dict[int, Candidates] = {}
        if pending:
            found = self._candidates(probs[upload(pending, self._device)], [states[row].pending for row in pending])
            candidates = dict(zip(pending, found, strict=True))
            for row, some in candidates.items():
                probs[row].zero_()[upload(some.draft_ids, self._device)] = upload(some.masses, self._device)
        return probs, draw(probs, uniforms), staged, candidates

    def _log_weights(self, states: Sequence[DrawState]) -> LogWeights | None:
        """Return the learned log-weights, and the rows that they are for; ``None`` if they are for none."""
        if self._learned is None or not any(state.uses_learned for state in states):
            return None
        rows = upload([float(state.uses_learned) for state in states], self._device)
        return LogWeights(rows, self._learned.log_weights)

    def _drop_rare_incomplete(self, probs: torch.Tensor) -> torch.Tensor:
        """Take incomplete characters out of the distributions in which they are unlikely together.

        Args:
            probs: ``[n, draft size]``, of draws with nothing pending; overwritten.

        Returns:
            ``[n] bool``: whether incomplete characters may be drawn.
        """
        mass = probs[:, self._incomplete_ids]
        total = mass.sum(-1, keepdim=True)
        stays = total >= MIN_PENDING_PROBABILITY
        probs.index_copy_(1, self._incomplete_ids, mass * stays)
        probs /= torch.where(stays, 1, 1 - total)
        return stays.squeeze(1)

    def _candidates(self, probs: torch.Tensor, pending: Sequence[bytes]) -> list[Candidates]:
        """Return the likeliest draft tokens, which are those that may be drawn with bytes pending.

        Leaves out a draft token that would emit at once a target token which the draft spells by way of pending bytes:
        the verification would reject it.

        Args:
            probs: ``[n, draft size]``, not yet pruned.
            pending: The bytes, ``[n]``.
        """
        likeliest = probs.topk(min(MAX_CANDIDATES, probs.shape[1]))
        # In one go; see `choose`.
        masses, draft_ids = torch.stack([likeliest.values, likeliest.indices.to(probs.dtype)]).tolist()
        return [self._emitting(*row) for row in zip(pending, masses, draft_ids, strict=True)]

    def _emitting(self, pending: bytes, masses: list[float], draft_ids: list[float]) -> Candidates:
        emissions = [self._transducer.emit(pending, int(draft_id)) for draft_id in draft_ids]
        waited_for = set(self._transducer.waits(pending).target_ids.tolist())
        kept = [i for i, (emitted, _) in enumerate(emissions) if not emitted or emitted[0] not in waited_for]
        kept = [i for i in kept if masses[i] > 0] or list(range(len(masses)))
        total = sum(masses[i] for i in kept)
        return Candidates(
            pending, [int(draft_ids[i]) for i in kept], [masses[i] / total for i in kept], [emissions[i] for i in kept]
        )

    def _greedy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the greedy choices.

        Args:
            logits: ``[n, draft size]``, masked.

        Returns:
            The probability of each choice ``[n]``, and draft ids ``[n]``.
        """
        probs = logits.softmax(-1, dtype=torch.float32)
        if self._adds_up:
            return self._likeliest_target(probs)
        confidences, next_ids = probs.max(-1)
        return confidences, next_ids

    def _likeliest_target(self, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the draft token that makes the likeliest target token.

        A target token is as likely as all draft tokens together that emit it first, and the likeliest of those is
        chosen. A draft token that emits nothing yet competes with its own probability, because its target token is
        unknown. Only the ``MAX_CANDIDATES`` likeliest draft tokens are considered.

        Args:
            probs: ``[n, draft size]``.

        Returns:
            The probability of each target token ``[n]``, and draft ids ``[n]``.
        """
        masses, draft_ids = probs.topk(min(MAX_CANDIDATES, probs.shape[1]))  # The likeliest first.
        labels = self._labels[draft_ids]
        # Each with the less likely ones of the same label, so that of all these the likeliest has the most.
        alike = (labels.unsqueeze(2) == labels.unsqueeze(1)).triu()
        confidences, best = (alike.float() @ masses.unsqueeze(2)).squeeze(2).max(-1, keepdim=True)
        return confidences.squeeze(1), draft_ids.gather(1, best).squeeze(1)
