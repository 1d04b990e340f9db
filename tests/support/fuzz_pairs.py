"""Searches, for as long as it is told, for a text and a schedule that a pair of vocabularies gets wrong.

    PYTHONPATH=tests:tests/support TOKENTIMING_DATA=DIR python tests/support/fuzz_pairs.py --minutes 10 --out fuzz.json

Every case draws a pair (lossy ones included), a text, and what is drafted and accepted of it, and checks what
`test_context.py`, `test_retokenize.py` and `test_transducer.py` promise. A failure is printed with its number, and
`--case NUMBER` repeats it.
"""

import argparse
import json
import random
import time
import traceback
from collections import Counter
from functools import cache
from pathlib import Path

from conftest import EXACT, LOSSY, load_pair, need, spellable
from context_follower import CODE, EMOJI, follow

from vllm_tokentiming.align.retokenize import retokenize
from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.vocab.pair import VocabularyPair

ALPHABETS = {
    "combining marks": ["e", "a", " ", *map(chr, range(0x300, 0x340)), "ה", "ּ", "ं", "क", "्"],
    "right to left": [*map(chr, [*range(0x5D0, 0x5EB), *range(0x620, 0x64B)]), " ", "\u200f", "\u202b", "1", "("],
    "emoji sequences": ["👩", "👨", "\u200d", "🏽", "🇫", "🇷", "🏳", "\ufe0f", "🌈", " ", "1\ufe0f\u20e3", "🙂"],
    "white space": [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "x", "▁", "\x00", "\x85"],
    "special text": [
        "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[SEP]", "<pad>",
        "<0x41>", "<|", "|>", "▁", "##", " ", "a", "\n",
    ],
    "digits and signs": [*"0123456789.,-+=()[]{}<>/\\'\"_#@!? ", "'s", "'LL", "...", "===", "\n"],
    "any character": [],
    "any bytes": [],
}  # fmt: skip


@cache
def languages() -> list[str]:
    """Texts of the shared data."""
    return [path.read_text(encoding="utf-8") for path in sorted(need("multilingual").rglob("*.txt"))]


@cache
def transducer(target: str, draft: str) -> Transducer:
    """Made once for each pair."""
    return Transducer(load_pair(target, draft))


def draw_text(kind: str, rng: random.Random) -> bytes:
    """A text of up to about 300 bytes."""
    if kind == "language":
        text = rng.choice([*languages(), CODE, EMOJI])
        start = rng.randrange(len(text))
        return text[start : start + rng.randint(1, 150)].encode()
    length = rng.randint(1, 80)
    if kind == "any bytes":
        return rng.randbytes(length)
    if kind == "any character":
        return "".join(chr(rng.choice([*range(0xD800), *range(0xE000, 0x110000)])) for _ in range(length)).encode()
    alphabet = rng.sample(ALPHABETS[kind], rng.randint(1, len(ALPHABETS[kind])))
    return "".join(rng.choices(alphabet, k=length)).encode()


def check_context(pair: VocabularyPair, data: bytes, rng: random.Random) -> int:
    """The context follows its target; returns the number of committed tokens."""
    follower = follow(pair, data, rng)
    if pair.exact:
        written = pair.draft.token_bytes.decode(follower.context.draft_ids)
        assert written == spellable(pair.draft.token_bytes, pair.target.token_bytes.decode(follower.committed)), "bytes"
    return len(follower.committed)


def check_proposals(pair: VocabularyPair, writer: Transducer, data: bytes, rng: random.Random) -> int:
    """What is drafted is proposed in target ids that exist and spell it; returns their number."""
    target_bytes, ends = pair.target.token_bytes, pair.special.to_target
    draftable = pair.draftable.nonzero()[0]
    draft_ids = [
        draft_id if rng.random() < 0.9 else int(rng.choice(draftable))
        for draft_id in pair.draft.encoder.encode(data)[:12]
        if pair.draftable[draft_id]
    ]
    draft_ids = [draft_id for draft_id in draft_ids if draft_id not in ends]
    drafted, pending = pair.draft.token_bytes.decode(draft_ids), b""
    proposed = retokenize(pair, draft_ids).target_ids
    emitted: list[int] = []
    for draft_id in draft_ids:
        target_ids, pending = writer.emit(pending, draft_id)
        emitted += target_ids
    if pair.exact:
        written = drafted[: len(drafted) - len(pending)]
        assert target_bytes.decode(emitted) == spellable(target_bytes, written), "emitted"
        assert target_bytes.decode(proposed) == spellable(target_bytes, drafted), "proposed"
    assert all(0 <= i < target_bytes.size and target_bytes.pieces[i] is not None for i in proposed + emitted), "ids"
    return len(proposed) + len(emitted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    names = [*EXACT, *LOSSY]
    kinds = ["language", *ALPHABETS]
    done: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    failures = []
    end, case = time.monotonic() + 60 * options.minutes, options.case or 0
    while time.monotonic() < end:
        rng = random.Random(f"{options.seed} {case}")
        target, draft = rng.sample(names, 2)
        kind = rng.choice(kinds)
        pair, data = load_pair(target, draft), draw_text(kind, rng)
        try:
            tokens["committed"] += check_context(pair, data, rng)
            tokens["proposed"] += check_proposals(pair, transducer(target, draft), data, rng)
        except Exception as error:
            failures.append({"case": case, "target": target, "draft": draft, "kind": kind, "error": repr(error)})
            print(failures[-1], data, "".join(traceback.format_exception(error)[-3:]), flush=True)
        done[kind] += 1
        case += 1
        if options.case is not None or len(failures) >= 20:
            break
    report = {"seed": options.seed, "minutes": options.minutes, "cases": done, "tokens": tokens, "failures": failures}
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
