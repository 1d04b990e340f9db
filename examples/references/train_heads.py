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
from features import TEXTS_IN_FILE, WIDEST, layers_read
from heads import UNROLLED, Eagle3, Medusa, output_layer
from safetensors.torch import load_file
from training import divided, fit, read_texts
from transformers import AutoConfig
from write_texts import LAW

WINDOW = 160  # Slots of a text in a step.
LATER = 0.8  # Weight of a step of a chain, relative to the step before.


@dataclass
class Example:
    """One text.

    Attributes:
        target_ids: `[n]` int64.
        states: `[n, 4, hidden]` float16.
        law_ids: `[n, LAW]` int64, in the kept part of the vocabulary.
        law_probs: `[n, LAW]` float32; 0 in the prompt, and for tokens that are not kept.
    """

    target_ids: torch.Tensor
    states: torch.Tensor
    law_ids: torch.Tensor
    law_probs: torch.Tensor


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
            target_ids = torch.tensor((row["prompt"] + row["output"])[:WIDEST])
            law_ids, law_probs = torch.zeros(len(target_ids), LAW, dtype=torch.long), torch.zeros(len(target_ids), LAW)
            start = len(row["prompt"])
            for i, (found, probs) in enumerate(row["laws"][: len(target_ids) - start], start):
                places = place[torch.tensor(found, dtype=torch.long)]
                law_ids[i, : len(found)] = places.clamp(min=0)
                law_probs[i, : len(found)] = torch.tensor(probs) * (places >= 0)
            examples.append(Example(target_ids, states, law_ids, law_probs))
    return examples


def main() -> None:
    """Train, and write the folder that vLLM loads."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("kind", choices=list(UNROLLED))
    parser.add_argument("--target", type=Path, required=True, help="folder of a Llama-like target")
    parser.add_argument("--texts", type=Path, required=True, help="what the target wrote, from write_texts.py")
    parser.add_argument("--states", type=Path, required=True, help="folder from features.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the head")
    parser.add_argument("--minutes", type=float, default=30, help="of processor time")
    parser.add_argument("--vocabulary", type=int, default=8192, help="target tokens that the head can propose")
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
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
    number = UNROLLED[options.kind]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} texts", flush=True)

    def chains(examples: list[Example], start: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each step: logits `[batch, n, kept]`, and the law's ids and probabilities, `[batch, n, LAW]`."""
        length = WINDOW + number + 1
        parts = [
            [getattr(e, name)[s : s + length] for e, s in zip(examples, start, strict=True)]
            for name in ("target_ids", "states", "law_ids", "law_probs")
        ]
        ids, states, law_ids, law_probs = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in parts)
        n = ids.shape[1] - number - 1
        found = model(states[:, :n].float(), embedding[ids[:, 1 : n + number]], number)
        return [
            (logits, law_ids[:, 2 + j : 2 + j + n], law_probs[:, 2 + j : 2 + j + n]) for j, logits in enumerate(found)
        ]

    def loss(_: float) -> torch.Tensor:
        examples = rng.sample(train, options.batch)
        start = [rng.randint(0, max(0, len(e.target_ids) - WINDOW - number - 1)) for e in examples]
        total = torch.zeros(())
        for j, (logits, law_ids, law_probs) in enumerate(chains(examples, start)):
            entropy = -(law_probs * logits.log_softmax(-1).gather(-1, law_ids)).sum()
            total = total + LATER**j * entropy / law_probs.gt(0).any(-1).sum().clamp(min=1)
        return total / number

    def evaluate() -> dict[str, float]:
        """For each step, the overlap with the target's law, and how often the likeliest tokens agree."""
        overlap, agree, count = [0.0] * number, [0.0] * number, [0.0] * number
        for e in held:
            start = max(0, int(e.law_probs.gt(0).any(-1).nonzero()[0]) - 16) if e.law_probs.any() else 0
            for j, (logits, law_ids, law_probs) in enumerate(chains([e], [start])):
                used = law_probs.gt(0).any(-1)
                probs = logits.softmax(-1).gather(-1, law_ids)
                overlap[j] += float(torch.minimum(probs, law_probs)[used].sum())
                best = law_ids.gather(-1, law_probs.argmax(-1, keepdim=True))[..., 0]
                agree[j] += float((logits.argmax(-1) == best)[used].sum())
                count[j] += float(used.sum())
        return {
            f"{name} {j + 1}": value[j] / max(1, count[j])
            for name, value in (("overlap", overlap), ("agree", agree))
            for j in range(number)
        }

    fit(model, loss, evaluate, options.out, seconds=60 * options.minutes, learning_rate=options.learning_rate)
    model.save(options.out, config, kept_ids, layers_read(options.target))


if __name__ == "__main__":
    main()
