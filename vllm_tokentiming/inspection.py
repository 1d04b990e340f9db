"""Describes a pair of vocabularies before anything is started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_tokentiming.align.retokenize import Proxy, align
from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair
from vllm_tokentiming.vocab.special_tokens import Role

# A little of several scripts, prose and code, for users who give no text of their own.
SAMPLE = (
    "The ferry leaves at half past seven, and nobody has bought a ticket yet.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0",
    "In 2024 the 3 rivers rose by 1,250 mm; that's 17.5 % more than usual!",
    "Die Straßenbahn fährt über die Brücke zum Bahnhof.",
    "Вчера мы долго ждали поезда, но он так и не пришёл.",
    "昨天下了一整天的雨，河水涨得很高。",
    "كان الطريق طويلا والجو باردا.",
    "कल सुबह हम बाज़ार जाएँगे।",
    "🙂 naïve café 👩‍👩‍👧",
)
_FEW = 0.3  # A share of common tokens below which much is lost in translation.
_MANY = 1.5  # Tokens of one side per token of the other beyond which lengths differ much.


@dataclass(frozen=True)
class BlockShares:
    """How the tokens of both sides lie over each other in a text, as shares of the alignment blocks."""

    one_to_one: float
    one_to_many: float  # One draft token, several target tokens.
    many_to_one: float
    many_to_many: float
    draft_tokens: int
    target_tokens: int


def block_shares(pair: VocabularyPair, texts: Iterable[bytes]) -> BlockShares:
    """Align both tokenizations of some texts.

    Args:
        pair: The vocabularies.
        texts: UTF-8.
    """
    counts: np.ndarray[Any, np.dtype[np.int64]] = np.zeros((2, 2), dtype=np.int64)
    draft_tokens = target_tokens = 0
    for text in texts:
        draft_ids, target_ids = pair.draft.encoder.encode(text), pair.target.encoder.encode(text)
        blocks = align(pair, draft_ids, Proxy(target_ids))
        several = np.stack([blocks[:, 1] - blocks[:, 0] > 1, blocks[:, 3] - blocks[:, 2] > 1]).astype(np.int64)
        np.add.at(counts, tuple(several), 1)
        draft_tokens, target_tokens = draft_tokens + len(draft_ids), target_tokens + len(target_ids)
    shares = counts / max(1, counts.sum())
    (one_to_one, one_to_many), (many_to_one, many_to_many) = shares.tolist()
    return BlockShares(one_to_one, one_to_many, many_to_one, many_to_many, draft_tokens, target_tokens)


def inspect(pair: VocabularyPair, texts: Iterable[bytes]) -> dict[str, Any]:
    """Describe a pair.

    Args:
        pair: The vocabularies.
        texts: UTF-8, of the kind that will be written.

    Returns:
        Plain JSON: ``target`` and ``draft``, ``overlap``, ``emissions``, ``blocks``, ``special_tokens``, ``chat``,
        ``warnings``.
    """
    target, draft = pair.target.token_bytes, pair.draft.token_bytes
    target_pieces, draft_pieces = (set(side.pieces) - {b"", None} for side in (target, draft))
    common = len(target_pieces & draft_pieces)
    counts = Transducer(pair).count[pair.draftable]
    shares = block_shares(pair, texts)
    found: dict[str, Any] = {
        "target": _describe(pair.target),
        "draft": _describe(pair.draft),
        "alignment": "byte-exact" if pair.exact else "lossy, by dynamic token warping",
        "overlap": {
            "of_draft": common / max(1, len(draft_pieces)),
            "of_target": common / max(1, len(target_pieces)),
        },
        "emissions": {
            "none": float((counts == 0).mean()),
            "one": float((counts == 1).mean()),
            "more": float((counts > 1).mean()),
        },
        "blocks": {
            "1:1": shares.one_to_one,
            "1:many": shares.one_to_many,
            "many:1": shares.many_to_one,
            "many:many": shares.many_to_many,
        },
        "draft_tokens_per_target_token": shares.draft_tokens / max(1, shares.target_tokens),
        "special_tokens": {
            "target_to_draft": {target.special[t]: draft.special[d] for t, d in sorted(pair.special.to_draft.items())},
            "draft_to_target": {draft.special[d]: target.special[t] for d, t in sorted(pair.special.to_target.items())},
            "not_mapped": [text for i, text in sorted(target.special.items()) if i not in pair.special.to_draft],
        },
        "chat": {name: list(texts) for name, texts in pair.turns.texts.items()},
    }
    return {**found, "warnings": _warnings(pair, found)}


def _describe(side: Vocabulary) -> dict[str, Any]:
    token_bytes = side.token_bytes
    return {
        "kind": token_bytes.kind.value,
        "ids": token_bytes.size,
        "special": len(token_bytes.special),
        "never_written": int((token_bytes.lengths <= 0).sum()) - len(token_bytes.special),
        "exact": side.exact,
        "roles": {role.value: token_bytes.special[i] for role, i in side.special.by_role.items()},
    }


def _warnings(pair: VocabularyPair, found: dict[str, Any]) -> list[str]:
    warnings = []
    for name in ("target", "draft"):
        if not found[name]["exact"]:
            warnings.append(
                f"The {name}'s tokenizer cannot spell every text, so the two are aligned by warping, and what it "
                "cannot spell costs acceptance."
            )
    if found["overlap"]["of_draft"] < _FEW:
        warnings.append(
            f"Only {found['overlap']['of_draft']:.0%} of the draft's tokens are the target's, too; most proposals are "
            "translated into several tokens."
        )
    ratio = found["draft_tokens_per_target_token"]
    if ratio > _MANY:
        warnings.append(f"The draft needs {ratio:.1f} passes for a token of the target's on this text.")
    if Role.END not in pair.target.special.by_role:
        warnings.append("The target has no end-of-text token that is known, so the draft cannot propose the end.")
    elif not any(role in pair.draft.special.by_role for role in (Role.END, Role.END_OF_TURN)):
        warnings.append("The draft has no end-of-text token that is known, so it never proposes the end.")
    return warnings


def as_text(found: dict[str, Any]) -> str:
    """Return a description for a reader.

    Args:
        found: From ``inspect``.
    """
    lines = []
    for name in ("target", "draft"):
        side = found[name]
        exact = "spells every text" if side["exact"] else "LOSSY"
        lines.append(
            f"{name:<8}{side['kind']}, {side['ids']:,} ids ({side['special']} special, {side['never_written']} never "
            f"written), {exact}"
        )
        lines.append("        " + (", ".join(f"{role}: {text}" for role, text in side["roles"].items()) or "no roles"))
    shown = {
        "alignment": found["alignment"],
        "common tokens": f"{found['overlap']['of_draft']:.0%} of the draft's, "
        f"{found['overlap']['of_target']:.0%} of the target's",
        "a draft token makes": ", ".join(
            f"{word} target token{'s' if word != 'one' else ''} {found['emissions'][word]:.0%}"
            for word in ("one", "more", "none")
        ),
        "blocks on this text": ", ".join(f"{name} {share:.0%}" for name, share in found["blocks"].items()),
        "draft per target token": f"{found['draft_tokens_per_target_token']:.2f}",
        "special tokens": ", ".join(f"{t} = {d}" for t, d in found["special_tokens"]["target_to_draft"].items())
        or "none in common",
    }
    if found["chat"]:
        shown["chat"] = "; ".join(f"{name}: {t!r} = {d!r}" for name, (t, d) in found["chat"].items())
    lines += [f"{label:<24}{value}" for label, value in shown.items()]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    return "\n".join(lines)
