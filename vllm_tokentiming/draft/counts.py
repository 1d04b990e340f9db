"""Counts of drafting, which ``vllm/metrics.py`` shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Counts since the start, in draft tokens if nothing else is said.

    Attributes:
        passes: Of the model.
        encoded: Added to contexts by encoding what the target wrote: all but accepted draft tokens.
        read: Of committed contexts, run through the draft.
        reread: Those of them that had entries already: last tokens of contexts, whose logits were needed.
        reused: Of committed contexts, not run, since the cache had them from another request or an earlier row.
        drafted: Written and run through the draft.
        kept: Those of them whose entries stood after verification: they are never in ``read``.
        proposed: Target tokens.
        staged: Those of them that are verified in stages.
        copied: Those of them that are copied (``repeats.py``).
        copies_accepted: Those of the copied ones that were accepted, as far as it is known.
        not_drafted: Requests that the draft could have proposed for in a step and did not, by reason: it would not pay
            (``length``), no free blocks (``blocks``), too long a context (``positions``), still reading (``reading``).
    """

    passes: int = 0
    encoded: int = 0
    read: int = 0
    reread: int = 0
    reused: int = 0
    drafted: int = 0
    kept: int = 0
    proposed: int = 0
    staged: int = 0
    copied: int = 0
    copies_accepted: int = 0
    not_drafted: Counter[str] = field(default_factory=Counter)
