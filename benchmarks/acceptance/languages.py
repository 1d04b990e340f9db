"""What a pair whose models know many languages wins in each of them.

    python -m benchmarks.acceptance.languages prepare --out DIR
    python -m benchmarks.acceptance.languages measure --prompts DIR/prompts.json --target DIR --draft DIR --pair NAME

A pair that is trained on the same languages:

    python examples/train_pair.py --text DIR/train.txt --out DIR/pair --held-out 20 --bf16 \
        --target-tokens 5500000 --draft-tokens 11000000

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

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.acceptance.acceptance import measure as write_all
from benchmarks.common.provenance import ROOT, provenance, write_data
from benchmarks.common.workloads import data_folder
from benchmarks.engines.conditions import add_options, add_pair, departures, engine_of
from vllm_tokentiming.inspection import block_shares
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair

sys.path.insert(0, str(ROOT / "examples"))
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


def measure(options: argparse.Namespace) -> None:
    """Let every method write, language by language, and write the data file."""
    prompts = json.loads(options.prompts.read_text())
    number = min([*map(len, prompts.values()), options.num_prompts]) // options.group * options.group
    options.methods, options.temperatures = COMPARED, TEMPERATURES
    cases = [{"workload": n, "concurrency": options.group, "prompts": texts[:number]} for n, texts in prompts.items()]
    results, failed = write_all(options, cases, options.temperatures)
    rows = []
    written: dict[str, list[str]] = {}
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    for method, result in results.items():
        for row in result["rows"]:
            # Without the first token, which no draft precedes.
            texts = [[tokenizer.decode(ids[1:]) for ids in group["target_ids"]] for group in row["groups"]]
            if method == "plain" and row["temperature"] == TEMPERATURES[-1]:
                written[row["workload"]] = [text for group in texts for text in group]
            rows.append(
                {
                    "method": method,
                    "language": row["workload"],
                    "temperature": row["temperature"],
                    "bytes": [sum(len(text.encode()) for text in group) for group in texts],
                    **{name: [group[name] for group in row["groups"]] for name in ("tokens", "passes")},
                }
            )
    content = {
        "provenance": provenance(),
        "departures": departures(engine_of(options)),
        "conditions": {name: result["conditions"] for name, result in results.items()},
        "pair": options.pair,
        "failed": failed,
        "prompts_of_each": number,
        "agreement": agreement(options.target, options.draft, written),
        "blocks": blocks(options.target, options.draft, written),
        "rows": rows,
    }
    write_data(options.out / f"{options.name}.json", content)


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
    add_pair(command, "languages")
    command.add_argument("--prompts", type=Path, required=True)
    command.add_argument("--group", type=int, default=4, help="prompts in a batch, and in an observation")
    command.add_argument("--tokens", type=int, default=48)
    command.add_argument("--proposals", type=int, default=5)
    command.add_argument("--num-prompts", type=int, default=1000, help="of each language, at most")
    add_options(command)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
