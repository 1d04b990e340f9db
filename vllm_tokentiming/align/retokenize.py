"""From drafted tokens to the proxy target sequence, and the alignment between the two.

The drafted tokens are read as bytes, the bytes are encoded by the target's tokenizer as they would be in the middle
of a text, and the two token sequences are aligned: by byte offsets where both vocabularies spell every text (a linear
scan), else by Dynamic Token Warping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tokentiming.align.dtw import span_blocks, warp
from vllm_tokentiming.vocab.pair import VocabularyPair


class Proxy(NamedTuple):
    """The proxy target sequence of a run of drafted tokens.

    Attributes:
        target_ids: What the target would write for the drafted text.
        ended: Whether the draft ended the text (or the turn), so that nothing can follow.
    """

    target_ids: list[int]
    ended: bool = False


def retokenize(pair: VocabularyPair, drafted_ids: Sequence[int]) -> Proxy:
    """Encode drafted text in the target's vocabulary.

    Args:
        pair: The vocabularies.
        drafted_ids: Draft ids, at most the last of which is special.

    Returns:
        The proxy target sequence; every id in it is an ordinary token of the target, but for the counterpart of a
        special token that the draft wrote.

    Raises:
        IndexError: An id is outside its vocabulary.
    """
    ended = bool(drafted_ids) and drafted_ids[-1] in pair.special.to_target
    target_ids = pair.target.encoder.encode(pair.draft.token_bytes.decode(drafted_ids))
    if ended:
        target_ids.append(pair.special.to_target[drafted_ids[-1]])
    return Proxy(target_ids, ended)


def align(pair: VocabularyPair, drafted_ids: Sequence[int], proxy: Proxy) -> npt.NDArray[np.int32]:
    """Align drafted tokens to their proxy target sequence.

    Args:
        pair: The vocabularies.
        drafted_ids: Draft ids.
        proxy: Their proxy target sequence.

    Returns:
        Blocks ``[B, 4] int32``, rows ``(draft start, draft end, target start, target end)``, half-open, in order.
    """
    draft_bytes, target_bytes = pair.draft.token_bytes, pair.target.token_bytes
    # The special token at the end has no bytes; it is its own block.
    num_draft, num_target = len(drafted_ids) - proxy.ended, len(proxy.target_ids) - proxy.ended
    draft_pieces = [draft_bytes[i] for i in drafted_ids[:num_draft]]
    target_pieces = [target_bytes[i] for i in proxy.target_ids[:num_target]]
    if pair.exact:
        blocks = span_blocks(draft_pieces, target_pieces)
    else:
        blocks, _ = warp(draft_pieces, target_pieces, window=pair.window)
    if proxy.ended:
        last = np.array([[num_draft, num_draft + 1, num_target, num_target + 1]], dtype=np.int32)
        blocks = np.concatenate([blocks, last])
    return blocks


def aligned_draft_tokens(blocks: npt.NDArray[np.int32], num_target: int) -> tuple[int, int]:
    """Return the longest run of whole blocks that the first ``num_target`` proxy tokens hold.

    Args:
        blocks: ``[B, 4] int32``, from ``align``.
        num_target: Proxy tokens that were accepted.

    Returns:
        How many drafted tokens, and how many proxy tokens, those blocks hold.
    """
    draft_end = target_end = 0
    for _, block_draft_end, _, block_target_end in blocks.tolist():
        if block_target_end > num_target:
            break
        draft_end, target_end = block_draft_end, block_target_end
    return draft_end, target_end
