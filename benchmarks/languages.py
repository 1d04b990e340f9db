"""What a pair that was trained on many languages wins in each of them.

    python benchmarks/languages.py prepare --out DIR
    python examples/train_pair.py --text DIR/train.txt --out DIR/pair --held-out 20 --bf16 \
        --target-tokens 5500000 --draft-tokens 11000000
    python benchmarks/languages.py measure --pair DIR/pair --prompts DIR/prompts.json --out languages.json \
        [--table LANGUAGES.md]

The text is XQuAD, the same articles in twelve languages, from the folder that `TOKENTIMING_DATA` names; prompts are
beginnings of parts of documents that are not in `train.txt`. The corpus does not say which language a document is in:
its script does, or, for Latin, its commonest little words.

A method is measured in bytes of text per target pass, since a token is not the same amount of text in all languages.
How well the two models agree is measured apart from any alignment: by how many bits more per byte the draft needs to
spell what the target has sampled (an estimate of their Kullback-Leibler divergence).
"""

import argparse
import json
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from acceptance import METHODS, interval, run_in_process
from provenance import provenance
from tables import table
from transformers import AutoModelForCausalLM, AutoTokenizer
from workloads import data_folder

from vllm_tokentiming.inspection import block_shares
from vllm_tokentiming.pair import Vocabulary, VocabularyPair

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_pair import SEPARATOR, bits_per_byte, read_documents

SCRIPTS = {
    "ARABIC": "Arabic", "CJK": "Chinese", "CYRILLIC": "Russian", "DEVANAGARI": "Hindi", "GREEK": "Greek",
    "THAI": "Thai",
}  # fmt: skip
LITTLE_WORDS = {
    "English": ("the", "of"), "German": ("der", "und"), "Romanian": ("și", "din"), "Spanish": ("el", "los"),
    "Turkish": ("ve", "bir"), "Vietnamese": ("và", "của"),
}  # fmt: skip
ARTICLE = 8000  # Characters; what is longer is no article, but a collection of sentences.
PART = 500  # Characters between the prompts of a document.
COMPARED = ("plain", "tli (vLLM)", "slem", "tokentiming")
TEMPERATURES = (0.0, 0.8, 1.0)  # The agreement is that at the last one, which has to be 1.


def language_of(document: str) -> str | None:
    """The language of an article; `None` for what is none."""
    scripts = Counter(unicodedata.name(letter, "?").split()[0] for letter in document if letter.isalpha())
    if len(document) > ARTICLE or not scripts:
        return None
    script = max(scripts, key=lambda name: scripts[name])
    if script != "LATIN":
        return SCRIPTS.get(script)
    words = Counter(re.findall(r"\w+", document.lower()))
    return max(LITTLE_WORDS, key=lambda language: sum(words[word] for word in LITTLE_WORDS[language]))


def prepare(options: argparse.Namespace) -> None:
    """Write what to train on, and prompts from other documents."""
    rng, corpus = random.Random(options.seed), data_folder() / "corpus"
    by_language: defaultdict[str, list[str]] = defaultdict(list)
    train: list[str] = []
    name = "multilingual_mixed"
    documents = read_documents([corpus / f"{name}.txt.xz"]) + json.loads((corpus / f"{name}.heldout.json").read_text())
    for document in documents:
        language = language_of(document)
        (train if language is None else by_language[language]).append(document)
    prompts = {}
    for language, documents in sorted(by_language.items()):
        rng.shuffle(documents)
        number = min(options.documents, len(documents) // 5)
        held_out, rest = documents[:number], documents[number:]
        train += rest
        starts = range(0, 4 * PART, PART)
        pieces = [document[start : start + options.characters] for document in held_out for start in starts]
        prompts[language] = [piece for piece in pieces if len(piece) == options.characters]
        print(f"{language}: {sum(map(len, rest)):,} characters to train on, {len(prompts[language])} prompts")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "train.txt").write_text(SEPARATOR.join(train), encoding="utf-8")
    (options.out / "prompts.json").write_text(json.dumps(prompts, ensure_ascii=False, indent=1), encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Let every method write, language by language."""
    prompts = json.loads(options.prompts.read_text())
    number = min(map(len, prompts.values())) // options.group * options.group
    target, draft = (options.pair / name for name in ("target", "draft"))
    job = {
        "target": str(target), "draft": str(draft), "temperatures": list(TEMPERATURES), "group": options.group,
        "proposals": options.proposals, "tokens": options.tokens, "dtype": "float32", "seed": options.seed,
        "prompts": [prompt for texts in prompts.values() for prompt in texts[:number]],
    }  # fmt: skip
    rows = []
    written: defaultdict[str, list[str]] = defaultdict(list)
    tokenizer = AutoTokenizer.from_pretrained(target)
    for method in COMPARED:
        groups = run_in_process({**job, "speculative": METHODS[method]})["rows"]
        languages = [language for language in prompts for _ in range(number // options.group)]
        for row, language in zip(groups, languages * len(TEMPERATURES), strict=True):
            texts = [tokenizer.decode(target_ids[1:]) for target_ids in row.pop("target_ids")]
            if method == "plain" and row["temperature"] == TEMPERATURES[-1]:
                written[language] += texts
            # Without the first token, which no draft precedes.
            rows.append({"method": method, "language": language, "bytes": sum(len(t.encode()) for t in texts), **row})
        print(f"{method}: done", flush=True)
    return {
        "provenance": provenance(), "rows": rows,
        "agreement": agreement(target, draft, written), "blocks": blocks(target, draft, written),
    }  # fmt: skip


def agreement(target: Path, draft: Path, texts: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """By language, bits that each model needs for a byte of what the target has written."""
    bits: dict[str, dict[str, float]] = {language: {} for language in texts}
    for name, path in (("target", target), ("draft", draft)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        for language, written in texts.items():
            bits[language][name] = bits_per_byte(model, tokenizer, written)
    return bits


def blocks(target: Path, draft: Path, texts: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """By language, draft tokens for a target token, and the share of blocks with one of each."""
    tokenizers = [AutoTokenizer.from_pretrained(path).backend_tokenizer for path in (target, draft)]
    pair = VocabularyPair.of(*map(Vocabulary.of, tokenizers))
    shares = {language: block_shares(pair, [text.encode() for text in written]) for language, written in texts.items()}
    return {
        language: {"ratio": found.draft_tokens / found.target_tokens, "one_to_one": found.one_to_one}
        for language, found in shares.items()
    }


def tables(result: dict[str, Any]) -> str:
    """What is won in each language, in short and in full."""
    found = result["provenance"]
    parts = [
        "# Languages\n\n"
        "Written by `benchmarks/languages.py`, which says what is measured, and how the pair was trained.\n"
        f"Bytes per target pass, with 95 % intervals; commit {found['commit'][:10]}, {found['processor']}.\n\n"
        "## In short\n"
    ]
    sections = []
    for temperature in TEMPERATURES:
        lines, won = _of_temperature(result, temperature)
        parts += [f"- T = {temperature:g}: {sentence}" for sentence in _in_words(won)]
        head = (
            "language", "plain", *(name for method in COMPARED[1:] for name in (method, "× plain")), "tokens per pass",
            "divergence, bits per byte", "draft tokens for a target token", "blocks 1:1",
        )  # fmt: skip
        sections.append(f"\n## Temperature {temperature:g}\n\n{table(head, lines)}")
    return "\n".join(parts + sections)


def _of_temperature(result: dict[str, Any], temperature: float) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """The rows of a table, and by method and language how many times plain decoding's bytes a pass gives."""
    lines = []
    won: dict[str, dict[str, float]] = {method: {} for method in COMPARED[1:]}
    for language, bits in result["agreement"].items():
        here = [r for r in result["rows"] if r["language"] == language and r["temperature"] == temperature]
        by_method = {method: [r for r in here if r["method"] == method] for method in COMPARED}
        in_bytes = {m: interval([{**row, "tokens": row["bytes"]} for row in rows]) for m, rows in by_method.items()}
        plain, cells = in_bytes["plain"][0], []
        for method in COMPARED[1:]:
            ratio, low, high = in_bytes[method]
            won[method][language] = ratio / plain
            cells += [f"{ratio:.2f} [{low:.2f}, {high:.2f}]", f"{ratio / plain:.2f}"]
        tokens, block = interval(by_method[COMPARED[-1]])[0], result["blocks"][language]
        lines.append(
            (language, f"{plain:.2f}", *cells, f"{tokens:.2f}", f"{bits['draft'] - bits['target']:.2f}",
             f"{block['ratio']:.2f}", f"{100 * block['one_to_one']:.0f} %")
        )  # fmt: skip
    return lines, won


def _in_words(won: dict[str, dict[str, float]]) -> list[str]:
    """One sentence for each method: the worst and the best language, and English."""
    sentences = []
    for method, by_language in won.items():
        ranked = sorted(by_language, key=lambda language: by_language[language])
        worst, best = ranked[0], ranked[-1]
        sentences.append(
            f"`{method}` writes {by_language[worst]:.2f} ({worst}) to {by_language[best]:.2f} ({best}) times plain "
            f"decoding's bytes in a pass, English {by_language['English']:.2f}."
        )
    return sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare")
    command.set_defaults(run=prepare)
    command.add_argument("--documents", type=int, default=8, help="of each language, that are not trained on")
    command.add_argument("--characters", type=int, default=120, help="of a prompt")
    command.add_argument("--out", type=Path, required=True)
    command = commands.add_parser("measure")
    command.set_defaults(run=measure)
    command.add_argument("--pair", type=Path, required=True, help="folder with `target` and `draft`")
    command.add_argument("--prompts", type=Path, required=True)
    command.add_argument("--group", type=int, default=4, help="prompts in a batch, and in an observation")
    command.add_argument("--tokens", type=int, default=48)
    command.add_argument("--proposals", type=int, default=5)
    command.add_argument("--out", type=Path, required=True, help="JSON file; only its tables are made if it exists")
    command.add_argument("--table", type=Path, help="Markdown file")
    options = parser.parse_args()
    if options.run is measure and options.out.exists():
        result = json.loads(options.out.read_text())
    else:
        result = options.run(options)
    if result is not None:
        options.out.write_text(json.dumps(result, indent=1))
        if options.table:
            options.table.write_text(tables(result))


if __name__ == "__main__":
    main()
