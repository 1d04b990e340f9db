"""The alignment prior: how likely a draft token stands where the target could write tokens of its own.

A draft token whose ends fall inside target tokens makes the target write pieces that it would never choose, and such
proposals are rejected. So the draft's law is multiplied by the share of the token's occurrences, in text, whose two
ends are also ends of target tokens. That is a choice of ``Q`` like any other, so exactness does not depend on it.

Pieces of characters are left alone: they wait for each other and are verified in stages, against all target tokens
that they may become (``verify/stages.py``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_tokentiming.align.transducer import is_piece
from vllm_tokentiming.vocab.pair import VocabularyPair


class AlignmentPrior:
    """Counts, per draft token, how often it stood and how often both its ends were ends of target tokens."""

    def __init__(self, pair: VocabularyPair) -> None:
        """Begin with no counts."""
        self._pair = pair
        size = pair.draft.token_bytes.size
        self._pieces = [
            i
            for i, data in enumerate(pair.draft.token_bytes.pieces)
            if data and (data[0] & 0xC0 == 0x80 or is_piece(data))
        ]
        self._seen: npt.NDArray[np.float64] = np.zeros(size)
        self._aligned: npt.NDArray[np.float64] = np.zeros(size)

    def observe(self, text: bytes, weight: float = 1.0) -> None:
        """Count the draft tokens of a text.

        Args:
            text: As it stands in a text; its two ends count as ends of target tokens.
            weight: What one occurrence counts.
        """
        draft_ids = np.array(self._pair.draft.encoder.encode(text), dtype=np.int64)
        target_ids = np.array(self._pair.target.encoder.encode(text), dtype=np.int64)
        if not len(draft_ids) or not len(target_ids):
            return
        draft_ends = self._pair.draft.token_bytes.lengths[draft_ids].cumsum()
        target_ends = self._pair.target.token_bytes.lengths[target_ids].cumsum()
        end_aligned = np.isin(draft_ends, target_ends)
        start_aligned = np.concatenate([[True], end_aligned[:-1]])
        np.add.at(self._seen, draft_ids, weight)
        np.add.at(self._aligned, draft_ids, weight * (start_aligned & end_aligned))

    def weights(self, smoothing: float = 1.0) -> npt.NDArray[np.float64]:
        """Return the prior, ``[draft size]``, in (0, 1].

        Args:
            smoothing: Occurrences' worth of trust in an unseen token being aligned.
        """
        weights = (self._aligned + smoothing) / (self._seen + smoothing)
        weights[self._pieces] = 1
        return weights
