"""Trains an EAGLE-3 head or Medusa heads for a target, on what it wrote.

    python examples/references/train_heads.py eagle3 --target DIR --texts texts.jsonl --states DIR --out DIR
    python examples/references/train_heads.py medusa ...

The heads learn the target's laws (`write_texts.py`), as far as their part of the vocabulary goes; later steps of a
chain count less.
"""

import argparse
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from features import TEXTS_IN_FILE, layers_read
from heads import UNROLLED, Eagle3, Medusa, output_layer
from safetensors.torch import load_file
from training import MOST_IN_LAW, WIDEST, divided, fit, law_of, read_texts
from transformers import AutoConfig

LATER = 0.8  # Weight of a step of a chain, relative to the step before.


@dataclass
class Example:
    """One text, from its beginning, which attention leans on.

    Attributes:
        target_ids: `[n]` int64.
        states: `[n, 4, hidden]` float16.
        law_ids: `[n, MOST_IN_LAW]` int64, in the kept part of the vocabulary.
        law_probs: `[n, MOST_IN_LAW]` float32; 0 in the prompt, and for tokens that are not kept.
        best: `[n]` int64, where the likeliest id is in the kept part; -1 if it is not kept, -2 in the prompt.
    """

    target_ids: torch.Tensor
    states: torch.Tensor
    law_ids: torch.Tensor
    law_probs: torch.Tensor
    best: torch.Tensor


def kept_part(rows: list[dict[str, Any]], size: int, vocabulary: int) -> torch.Tensor:
    """The target ids that the heads can propose: the commonest of the outputs, then the lowest, `[size]` int64."""
    counts = Counter(i for row in rows for i in row["output"])
    common = [i for i, _ in counts.most_common(size)]
    rest = (i for i in range(vocabulary) if i not in counts)
    return torch.tensor(sorted(common + [next(rest) for _ in range(size - len(common))]))


def read_examples(rows: list[dict[str, Any]], folder: Path, kept_ids: torch.Tensor, vocabulary: int) -> list[Example]:
    """The texts with their states, as far as there are states."""
    place = torch.full((vocabulary,), -1)
    place[kept_ids] = torch.arange(len(kept_ids))
    examples = []
    for first in range(0, len(rows), TEXTS_IN_FILE):
        file = folder / f"{first:06}.pt"
        if not file.exists():
            break
        for row, states in zip(rows[first:], torch.load(file), strict=False):
            target_ids, start = torch.tensor((row["prompt"] + row["output"])[:WIDEST]), len(row["prompt"])
            size = len(target_ids)
            law_ids, law_probs = torch.zeros(size, MOST_IN_LAW, dtype=torch.long), torch.zeros(size, MOST_IN_LAW)
            best = torch.full((size,), -2)
            for i in range(start, size):
                law = law_of(row, i - start)
                places = place[torch.tensor(list(law))]
                law_ids[i, : len(law)] = places.clamp(min=0)
                law_probs[i, : len(law)] = torch.tensor(list(law.values())) * (places >= 0)
                best[i] = place[max(law, key=law.__getitem__)]
            examples.append(Example(target_ids, states, law_ids, law_probs, best))
    return examples


def main() -> None:
    """Train, and write the folder that vLLM loads."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("kind", choices=("eagle3", "medusa"))
    parser.add_argument("--target", type=Path, required=True, help="folder of a Llama-like target")
    parser.add_argument("--texts", type=Path, required=True, help="what the target wrote, from write_texts.py")
    parser.add_argument("--states", type=Path, required=True, help="folder from features.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the head")
    parser.add_argument("--minutes", type=float, default=30, help="of processor time")
    parser.add_argument("--vocabulary", type=int, default=8192, help="target tokens that the head can propose")
    parser.add_argument("--batch", type=int, default=2, help="texts in a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    config = AutoConfig.from_pretrained(options.target)
    weights = {name: tensor.float() for name, tensor in load_file(options.target / "model.safetensors").items()}
    embedding = weights["model.embed_tokens.weight"]
    rows = read_texts(options.texts)
    kept_ids = kept_part(divided(rows)[0], options.vocabulary, len(output_layer(weights)))
    train, held = divided(read_examples(rows, options.states, kept_ids, len(embedding)))
    model = {"eagle3": Eagle3, "medusa": Medusa}[options.kind](config, weights, kept_ids)
    del weights
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} texts", flush=True)

    def chains(examples: list[Example]) -> list[tuple[torch.Tensor, ...]]:
        """For each step and each token with a law: logits, the law's ids and probabilities, and its likeliest id."""
        names = ("target_ids", "states", "law_ids", "law_probs", "best")
        ids, states, law_ids, law_probs, best = (
            torch.nn.utils.rnn.pad_sequence([getattr(e, name) for e in examples], batch_first=True, padding_value=fill)
            for name, fill in zip(names, (0, 0, 0, 0, -2), strict=True)
        )
        n = ids.shape[1] - UNROLLED - 1
        cuts = [slice(2 + j, 2 + j + n) for j in range(UNROLLED)]
        used = [best[:, cut] > -2 for cut in cuts]
        found = model(states[:, :n].float(), embedding[ids[:, 1 : n + UNROLLED]], used)
        return [
            (logits, law_ids[:, cut][wanted], law_probs[:, cut][wanted], best[:, cut][wanted])
            for logits, cut, wanted in zip(found, cuts, used, strict=True)
        ]

    def loss(_: float) -> torch.Tensor:
        total = torch.zeros(())
        for j, (logits, law_ids, law_probs, _) in enumerate(chains(rng.sample(train, options.batch))):
            entropy = -(law_probs * logits.log_softmax(-1).gather(-1, law_ids)).sum(-1)
            total = total + LATER**j * entropy.mean()
        return total / UNROLLED

    def evaluate() -> dict[str, float]:
        """For each step, the overlap with the target's law, and how often the likeliest tokens agree."""
        overlap, agree, count = ([0.0] * UNROLLED for _ in range(3))
        for e in held:
            for j, (logits, law_ids, law_probs, best) in enumerate(chains([e])):
                probs = logits.softmax(-1).gather(-1, law_ids)
                overlap[j] += float(torch.minimum(probs, law_probs).sum())
                agree[j] += float((logits.argmax(-1) == best).sum())
                count[j] += len(best)
        return {
            f"{name} {j + 1}": value[j] / max(1, count[j])
            for name, value in (("overlap", overlap), ("agree", agree))
            for j in range(UNROLLED)
        }

    fit(model, loss, evaluate, options.out, seconds=60 * options.minutes, learning_rate=options.learning_rate)
    model.save(options.out, config, kept_ids, layers_read(options.target))


if __name__ == "__main__":
    main()
