"""Trains a draft for a target, with a vocabulary of its own or with the target's.

    python examples/references/train_draft.py --target DIR --texts texts.jsonl --out DIR --minutes 30
    python examples/references/train_draft.py ... --vocabulary 0

The draft learns the target's laws, not only its texts. Where the two cut a text at the same place, the target's law
over its tokens is also a law over the draft's next token: each target token gives its probability to the draft token
that its spelling begins with, and inside a target token those count that agree with what the draft has written of it.
That is the push-forward of proposals (`vllm_tokentiming/transfer/`) turned round, so that what is trained is what is
accepted. The likeliest tokens carry the law; what they leave goes to the token that the target has written.

A target writes a few hundred tokens a second here, which is too little to learn a language from. So the draft begins
with other text (`--given`), less and less of it, and none that is not the target's at the end of its budget.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training import divided, fit, read_texts
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from write_texts import LAW

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_pair import Plan, batches, build_model, encode, read_documents, train_target_tokenizer

WIDEST = 512  # Tokens of a text that are read.
# Of other text: how many documents, how much of each, and the part of the budget after which none is read.
GIVEN_DOCUMENTS, GIVEN_CHARACTERS, GIVEN_UNTIL = 3000, 4000, 0.8


def own_tokenizer(target: Any, texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` entries, learnt from texts, with the target's chat template and its special tokens."""
    tokenizer = train_target_tokenizer(texts, size)
    template = target.chat_template or ""
    used = [token for token in target.all_special_tokens if token in template]
    tokenizer.add_special_tokens({"additional_special_tokens": used})
    tokenizer.chat_template = target.chat_template
    tokenizer.eos_token = target.eos_token
    tokenizer.pad_token = target.eos_token
    return tokenizer


class Spelling:
    """How target tokens are spelt in draft tokens."""

    def __init__(self, target: Any, draft: Any, same: bool) -> None:
        """Keep the two tokenizers; `same` says that they are one."""
        self.same = same
        self._target, self._draft = target, draft
        self._known: dict[int, list[int]] = {}

    def of(self, target_id: int) -> list[int]:
        """The draft ids of one target token, spelt alone."""
        if self.same:
            return [target_id]
        if target_id not in self._known:
            text = self._target.decode([target_id], skip_special_tokens=False)
            # Part of a character has no text of its own.
            spelt = [] if "\ufffd" in text else self._draft(text, add_special_tokens=False).input_ids
            self._known[target_id] = spelt
        return self._known[target_id]


@dataclass
class Example:
    """One text in draft tokens.

    Attributes:
        draft_ids: `[n]` int64.
        label_ids: `[n, LAW + 1]` int64; row `i` is the law of token `i`; the last is the token itself.
        label_probs: `[n, LAW + 1]` float32; rows of the prompt are 0.
    """

    draft_ids: torch.Tensor
    label_ids: torch.Tensor
    label_probs: torch.Tensor


def labels(spelling: Spelling, law: list[list[Any]], prefix: list[int], actual: int) -> tuple[list[int], list[float]]:
    """The law of a draft token, as far as the target's law gives it.

    Args:
        spelling: Of target tokens.
        law: The target's likeliest ids and their probabilities.
        prefix: Draft ids already written of the target's token.
        actual: The draft id that comes.
    """
    found: dict[int, float] = {}
    reached = 0.0
    for target_id, probability in zip(*law, strict=True):
        spelt = spelling.of(target_id)
        if len(spelt) > len(prefix) and spelt[: len(prefix)] == prefix:
            found[spelt[len(prefix)]] = found.get(spelt[len(prefix)], 0.0) + probability
            reached += probability
    rest = max(0.0, 1 - sum(law[1]))
    total = reached + rest
    if not total:
        return [actual], [1.0]
    return [*found, actual], [*(p / total for p in found.values()), rest / total]


def example(row: dict[str, Any], spelling: Spelling, target: Any, draft: Any) -> Example:
    """A text with the laws of its output, in draft tokens."""
    prompt = row["prompt"] if spelling.same else draft(target.decode(row["prompt"]), add_special_tokens=False).input_ids
    draft_ids = list(prompt)
    laws: list[tuple[list[int], list[float]]] = [([], [])] * len(prompt)
    for target_id, law in zip(row["output"], row["laws"], strict=True):
        spelt = spelling.of(target_id)
        for place, draft_id in enumerate(spelt):
            laws.append(labels(spelling, law, spelt[:place], draft_id))
            draft_ids.append(draft_id)
    ids = torch.tensor(draft_ids[-WIDEST:])
    label_ids, label_probs = torch.zeros(len(ids), LAW + 1, dtype=torch.long), torch.zeros(len(ids), LAW + 1)
    for i, (found, probs) in enumerate(laws[-WIDEST:]):
        label_ids[i, : len(found)] = torch.tensor(found, dtype=torch.long)
        label_probs[i, : len(found)] = torch.tensor(probs)
    return Example(ids, label_ids, label_probs)


def batch_of(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids padded at the end, and label ids and probabilities one position earlier, and which positions have labels."""
    ids = torch.nn.utils.rnn.pad_sequence([e.draft_ids[:-1] for e in examples], batch_first=True)
    label_ids = torch.nn.utils.rnn.pad_sequence([e.label_ids[1:] for e in examples], batch_first=True)
    probs = torch.nn.utils.rnn.pad_sequence([e.label_probs[1:] for e in examples], batch_first=True)
    return ids, label_ids, probs, probs.sum(-1) > 0


def main() -> None:
    """Train, and write the draft's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--target", type=Path, required=True, help="folder of the target")
    parser.add_argument("--texts", type=Path, required=True, help="what the target wrote, from write_texts.py")
    parser.add_argument("--given", type=Path, nargs="*", default=[], help=".txt or .txt.xz files to begin with")
    parser.add_argument("--out", type=Path, required=True, help="folder for the draft")
    parser.add_argument("--minutes", type=float, default=30, help="of processor time")
    parser.add_argument("--vocabulary", type=int, default=4096, help="entries; 0 for the target's own vocabulary")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="texts in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    target = AutoTokenizer.from_pretrained(options.target)
    train_rows, held_rows = divided(read_texts(options.texts))
    if options.vocabulary:
        texts = [target.decode(row["output"], skip_special_tokens=True) for row in train_rows]
        draft = own_tokenizer(target, texts, options.vocabulary)
    else:
        draft = target
    plan = Plan(len(draft), options.layers, options.width, 0, options.learning_rate)
    model: LlamaForCausalLM = build_model(draft, plan)
    spelling = Spelling(target, draft, not options.vocabulary)
    train, held = ([example(row, spelling, target, draft) for row in rows] for rows in (train_rows, held_rows))
    tokens = sum(len(e.draft_ids) for e in train)
    print(f"{model.num_parameters():,} parameters, {len(train):,} texts, {tokens:,} draft tokens", flush=True)

    given = None
    if options.given:
        documents = [document[:GIVEN_CHARACTERS] for document in read_documents(options.given)]
        rng.shuffle(documents)
        ids = [i for text in documents[:GIVEN_DOCUMENTS] for i in [draft.eos_token_id, *encode(draft, text)]]
        given = batches(torch.tensor(ids), None, options.batch, WIDEST // 2)
        print(f"{len(ids):,} draft tokens of other text", flush=True)

    def log_probs(examples: list[Example]) -> tuple[torch.Tensor, ...]:
        """Of the labels `[m, LAW + 1]`, the labels' probabilities, and the draft's likeliest ids `[m]`."""
        ids, label_ids, probs, used = batch_of(examples)
        hidden = model.model(input_ids=ids).last_hidden_state[used]
        logits = model.lm_head(hidden)
        return logits.log_softmax(-1).gather(-1, label_ids[used]), probs[used], label_ids[used], logits.argmax(-1)

    def loss(part: float) -> torch.Tensor:
        if given is not None and rng.random() < 1 - part / GIVEN_UNTIL:
            ids = next(given)
            text_loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
            return text_loss
        found, probs, _, _ = log_probs(rng.sample(train, options.batch))
        return -(probs * found).sum(-1).mean()

    def evaluate() -> dict[str, float]:
        """Cross-entropy, the probability that a draft token is accepted at T = 1, and how often the likeliest agree."""
        entropy = overlap = agree = count = 0.0
        for start in range(0, len(held), options.batch):
            found, probs, label_ids, best = log_probs(held[start : start + options.batch])
            # An id may stand twice, as the token itself and in the law.
            law = torch.zeros(len(best), len(draft)).scatter_add_(1, label_ids, probs)
            drafted = torch.zeros_like(law).scatter_(1, label_ids, found.exp())
            entropy -= float((probs * found).sum())
            overlap += float(torch.minimum(law, drafted).sum())
            agree += float((law.argmax(-1) == best).sum())
            count += len(best)
        return {"cross_entropy": entropy / count, "overlap": overlap / count, "agree": agree / count}

    fit(model, loss, evaluate, options.out, seconds=60 * options.minutes, learning_rate=options.learning_rate)
    model.to(torch.bfloat16).save_pretrained(options.out)
    draft.save_pretrained(options.out)


if __name__ == "__main__":
    main()
