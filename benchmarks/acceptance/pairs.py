"""What happens between every two of some tokenizers, in every language of some texts; needs no model.

    python -m benchmarks.acceptance.pairs --tokenizers DIR --texts DIR

For each ordered pair, each text is committed by the target as in decoding: the draft writes some of its tokens, the
target accepts a part of them, adds one of its own, and now and then goes on by a random id. After each commit, the
draft's context has to spell what the target has committed. A draft whose tokenizer cannot spell every text comes as
close as it can: how close is 1 less the edit distance of the two at the end, per byte of the longer one. The shares of
alignment blocks are those of the whole text.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer

from benchmarks.common.provenance import DATA, provenance, write_data
from vllm_tokentiming.align.retokenize import retokenize
from vllm_tokentiming.context import DraftContext, Drafted
from vllm_tokentiming.inspection import block_shares
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair

CODE = Path(__file__)  # A text in a language of its own.
SAME_LANGUAGE = {"arb": "ara", "cmn_hans": "cmn"}


def read_texts(folder: Path, length: int) -> dict[str, bytes]:
    """By language, the beginnings of all its `.txt` files (NAME.LANGUAGE.txt), in whole characters; and Python."""
    texts: defaultdict[str, bytes] = defaultdict(bytes)
    for path in [*sorted(folder.rglob("*.txt")), CODE]:
        name = "python" if path is CODE else path.stem.rpartition(".")[2]
        texts[SAME_LANGUAGE.get(name, name)] += path.read_text(encoding="utf-8")[:length].encode()
    return texts


def follow(pair: VocabularyPair, data: bytes, rng: random.Random) -> dict[str, float]:
    """Walk through a text as decoding does.

    Returns:
        How many commits; after how many of them the context did not spell what was committed; how alike the two are in
        the end; and how many proposed ids do not exist.
    """
    context, committed = DraftContext(pair), bytearray()
    target_bytes, draft_bytes = pair.target.token_bytes, pair.draft.token_bytes
    rest = pair.target.encoder.encode(data)
    commits = errors = outside = 0
    while rest:
        drafted, accepted = None, 0
        if draft_ids := pair.draft.encoder.encode(target_bytes.decode(rest[:8]))[: rng.randint(1, 8)]:
            if rng.random() < 0.3:
                draft_ids[-1] = rng.choice(pair.draftable.nonzero()[0].tolist())
            drafted = Drafted(draft_ids, retokenize(pair, draft_ids))
            proposed = drafted.proxy.target_ids
            outside += sum(not 0 <= target_id < target_bytes.size for target_id in proposed)
            while accepted < min(len(proposed), len(rest)) and proposed[accepted] == rest[accepted]:
                accepted += 1
            accepted = rng.randint(0, accepted)
        written, rest = rest[: accepted + 1], rest[accepted + 1 :]
        if rng.random() < 0.1:  # What no tokenizer would produce.
            written[-1] = rng.randrange(target_bytes.size)
            while target_bytes.pieces[written[-1]] is None:
                written[-1] = rng.randrange(target_bytes.size)
        context.commit(written, drafted)
        committed += target_bytes.decode(written)
        commits += 1
        spelt = draft_bytes.decode(context.draft_ids[len(pair.draft_prefix) :])
        errors += spelt != committed
    alike = Levenshtein.normalized_similarity(spelt, bytes(committed))
    return {"commits": commits, "context_errors": errors, "alike": alike, "ids_outside": outside}


def measure(names: dict[str, Vocabulary], texts: dict[str, bytes], seed: int) -> Iterable[dict[str, Any]]:
    """One row for each ordered pair and text."""
    for target in names:
        for draft in names:
            if target == draft:
                continue
            pair = VocabularyPair.of(names[target], names[draft])
            for language, data in texts.items():
                rng = random.Random(f"{seed} {target} {draft} {language}")
                yield {
                    "target": target, "draft": draft, "exact": pair.exact, "text": language,
                    **follow(pair, data, rng), **asdict(block_shares(pair, [data])),
                }  # fmt: skip
            print(f"{target} - {draft}", flush=True)


def packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows by pair, with the numbers of each text in one list, in the order of `columns`."""
    columns = [name for name in rows[0] if name not in ("target", "draft", "exact", "text")]
    by_pair: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        about = {name: row[name] for name in ("target", "draft", "exact")}
        entry = by_pair.setdefault((row["target"], row["draft"]), {**about, "texts": {}})
        entry["texts"][row["text"]] = [row[name] for name in columns]
    return {"columns": columns, "rows": list(by_pair.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder of folders with a tokenizer.json each")
    parser.add_argument("--texts", type=Path, required=True, help="folder with .txt files, one for each language")
    parser.add_argument("--length", type=int, default=1500, help="characters of each text")
    parser.add_argument("--seed", type=int, default=0, help="of what is accepted")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    options = parser.parse_args()
    vocabularies = {
        path.parent.name: Vocabulary.of(Tokenizer.from_file(str(path)))
        for path in sorted(options.tokenizers.glob("*/tokenizer.json"))
    }
    texts = read_texts(options.texts, options.length)
    rows = list(measure(vocabularies, dict(sorted(texts.items())), options.seed))
    settings = {"length": options.length, "seed": options.seed}
    write_data(options.out / "pairs.json", {"provenance": provenance(), "settings": settings, **packed(rows)})
    if wrong := [row for row in rows if row["ids_outside"] or (row["exact"] and row["context_errors"])]:
        raise SystemExit(f"wrong: {wrong[0]} and {len(wrong) - 1} more")


if __name__ == "__main__":
    main()
