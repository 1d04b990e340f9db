"""How a sampled request's draft is drawn: the parameters, and the random numbers.

A draw uses one uniform number, which depends on the request's seed, the position in the target's text, and the pass
alone: not on the batch, not on the rank, and not on the generator that the target samples with. So does the
verification of blocks (``verify/block.py``), with numbers of its own.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

_WORDS = struct.Struct("<8Q")


@dataclass(frozen=True)
class DraftSampling:
    """How a sampled request's draft is drawn.

    Attributes:
        seed: A whole number of any size, the same on every rank.
        temperature: Above 0.
        top_k: 0 for all.
        top_p: 1 for all.
        min_p: 0 for all.
    """

    seed: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def seed_of(request_id: str, seed: int | None, draft_seed: int = 0) -> int:
    """Return the draft's seed for a request: from the request's seed, else from its id, and from the user's seed."""
    text = f"{draft_seed} " + (f"seed {seed}" if seed is not None else f"id {request_id}")
    return int.from_bytes(hashlib.blake2b(f"tokentiming draft {text}".encode(), digest_size=8).digest(), "little")


def target_seed(seed: int, version: int) -> int:
    """Return the seed of the target's random numbers, for an engine that begins with learned weights.

    Args:
        seed: What it would be without them.
        version: That of the weights.

    Returns:
        A number that numpy takes, below 2**32.
    """
    text = f"tokentiming target {seed} {version}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def uniforms(seed: int, position: int, number: int, purpose: bytes = b"") -> list[float]:
    """Return uniform numbers in [0, 1) for a step that begins at a position.

    A hash of where they belong: setting numpy's Philox up for so few of them takes several times as long.

    Args:
        seed: Of the request.
        position: The number of target tokens before the step.
        number: How many.
        purpose: Sets numbers apart that must be independent. Without one, they are for the passes of the draft.
    """
    numbers: list[float] = []
    for block in range(-(-number // 8)):
        words = _WORDS.unpack(hashlib.blake2b(b"%d %d %d%b" % (seed, position, block, purpose)).digest())
        numbers += [(word >> 11) * 2.0**-53 for word in words]
    return numbers[:number]
