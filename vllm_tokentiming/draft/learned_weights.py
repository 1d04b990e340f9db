"""One log-weight for each draft token, learned while the target serves: a correction of the draft's distribution.

Verification shows the target's whole distribution ``p`` at each verified position, and the draft's distribution ``Q``
there is known. With ``q`` the push-forward of ``Q`` to the target's vocabulary, the first proposal is accepted with the
probability ``sum over t of min(p(t), q(t))``. If ``Q`` is multiplied by ``exp(w)`` and normalised, the gradient of that
with respect to ``w(d)`` is

    Q(d) (g(d) - sum over e of Q(e) g(e)),  g(d) = 1 where q(first(d)) < p(first(d)), else 0

with ``first(d)`` the first target token that ``d`` emits, and ``g(d) = 0`` where it emits none. So a draft token gains
weight where the target wants more of what it makes. One that makes a piece which the target never writes loses weight.

**The steps are Adagrad's, and forget.** A change of text asks for other weights. So the sums of squares decay, which
lets the steps become large again. The weights themselves shrink a little towards 0, where they began, and are limited.

**Nothing waits.** All of it stays on the device. The cost is bounded, because a step teaches few positions
(``most_lessons``).

Why proposals may be drawn from a distribution that learns stands in ``docs/theory.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_tokentiming.align.transducer import Transducer

RATE = 0.4  # A rate of 0.2 learns more slowly, and one of 0.8 no faster.
MEMORY = 0.998  # What a lesson leaves of the sums of squares, above what they begin with.
KEPT = 0.9999  # What is left of a weight after a lesson.
FIRST_SQUARES = 1e-4  # What the sums of squares begin with, so that draft tokens that are never likely hardly move.
_NEVER_LIKELY = 1e-9  # Counts as 0. The squares of smaller numbers are subnormal, which takes CPUs ten times as long.
# Of all log-weights, up and down. The gradient of an unlikely draft token is small, so one with a much smaller weight
# would hardly come back when the text wants it again.
LARGEST = 3.0
# More than any sum of squares becomes: gradients are at most 1. A larger one would stop the learning for long.
_MOST_SQUARES = 2 / (1 - MEMORY)
_MOST_VERSIONS = 1 << 62
_MOST_LESSONS = {"cpu": 2}  # In a step. On a CPU, a lesson takes a part of the time of the draft's pass.
_MOST_LESSONS_ELSEWHERE = 16


class Lesson(NamedTuple):
    """A position that the target has verified.

    Attributes:
        target_row: Its row of the target's logits.
        draft_probs: ``[draft size] float32``, the ``Q`` that the proposal there was drawn from, with nothing pending.
    """

    target_row: int
    draft_probs: torch.Tensor


class LearnedWeights:
    """The log-weights of one pair.

    Attributes:
        log_weights: ``[draft size] float32``; all 0 in the beginning.
        version: How often they have changed, in earlier engines, too, where they come from there.
        num_lessons: Verified positions that this engine has learned from.
        most_lessons: Most verified positions to learn from in a step.
    """

    def __init__(self, transducer: Transducer, draft_size: int, device: torch.device) -> None:
        """Begin with weights of 0.

        Args:
            transducer: The pair's transducer.
            draft_size: Columns of the draft's logits.
            device: Where the draft's logits are.
        """
        first = torch.from_numpy(transducer.first)[:draft_size]
        # The target tokens that are emitted first by any draft token, and which of these each draft token emits.
        target_ids, places = first.clamp(min=0).unique(return_inverse=True)
        self._target_ids, self._places = target_ids.to(device), places.to(device)
        self._emits = (first >= 0).float().to(device)
        self._squares = torch.full((draft_size,), FIRST_SQUARES, device=device)
        self.log_weights = torch.zeros(draft_size, device=device)
        self.version = 0
        self.num_lessons = 0
        self.most_lessons = _MOST_LESSONS.get(device.type, _MOST_LESSONS_ELSEWHERE)

    @torch.inference_mode()
    def state(self) -> torch.Tensor:
        """Return a copy of the log-weights and of the sums of squares, ``[2, draft size] float32``, without waiting."""
        return torch.stack((self.log_weights, self._squares))

    @torch.inference_mode()
    def restore(self, version: int, state: torch.Tensor) -> None:
        """Go on from what another engine has learned.

        Args:
            version: Its version. Random numbers of smaller ones may have taught it, so they are not used again.
            state: See ``state``.

        Raises:
            ValueError: Nothing of this size has ever learned that; the message is the second half of a sentence.
        """
        if state.dtype != torch.float32 or state.shape != (2, len(self.log_weights)):
            raise ValueError("it is of another size")
        log_weights, squares = state
        # What is no number fails each comparison.
        if not ((log_weights.abs() <= LARGEST) & (squares >= FIRST_SQUARES / 2) & (squares <= _MOST_SQUARES)).all():
            raise ValueError("its numbers are outside of what is learned")
        if not 0 < version < _MOST_VERSIONS:
            raise ValueError(f"its version is {version}")
        self.version = version
        self.log_weights.copy_(log_weights)
        self._squares.copy_(squares)

    @torch.inference_mode()
    def learn(self, draft_probs: torch.Tensor, target_probs: torch.Tensor) -> None:
        """Learn from verified positions.

        Args:
            draft_probs: ``[n, draft size] float32``, the ``Q`` of each. A row that is not finite teaches nothing.
            target_probs: ``[n, target size] float32``, the ``p`` of each. The same.
        """
        self.version += 1
        self.num_lessons += len(draft_probs)
        gradients = self.gradients(draft_probs, target_probs)
        sound = (draft_probs.sum(-1) + target_probs.sum(-1)).isfinite()
        gradients = torch.where(sound.unsqueeze(1), gradients, 0)
        memory = MEMORY ** len(gradients)
        self._squares.mul_(memory).add_((1 - memory) * FIRST_SQUARES).add_(gradients.square().sum(0))
        steps = gradients.sum(0).mul_(RATE).div_(self._squares.sqrt())
        self.log_weights.mul_(KEPT ** len(gradients)).add_(steps).clamp_(-LARGEST, LARGEST)

    def gradients(self, draft_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
        """Return the gradients of the acceptance with respect to the log-weights.

        Args:
            draft_probs: ``[n, draft size]``.
            target_probs: ``[n, target size]``.

        Returns:
            ``[n, draft size]``.
        """
        draft_probs = torch.threshold(draft_probs, _NEVER_LIKELY, 0)
        # Only of target tokens that a draft token emits first: the target's vocabulary may be much larger.
        p = target_probs.index_select(1, self._target_ids)
        q = torch.zeros_like(p).index_add_(1, self._places, draft_probs * self._emits)
        gains = (q < p).float().gather(1, self._places.expand(len(p), -1)).mul_(self._emits)
        return draft_probs * (gains - (draft_probs * gains).sum(-1, keepdim=True))
