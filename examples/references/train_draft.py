"""Trains a draft for a target, with a vocabulary of its own or with the target's.

    python examples/references/train_draft.py --target DIR --texts texts.jsonl --out DIR --minutes 30
    python examples/references/train_draft.py ... --vocabulary 0

The draft learns the target's laws, not only its texts. Where the two cut a text at the same place, the target's law
over its tokens is also a law over the draft's next token: each target token gives its probability to the draft token
that its spelling begins with, and inside a target token those count that agree with what the draft has written of it.
That is the push-forward of proposals (`vllm_tokentiming/transfer/`) turned round, so that what is trained is what is
accepted. A draft token that reaches into the next target token has the text's own law, which is all on that token.

A target writes a few hundred tokens a second here, which is too little to learn a language from. So the draft begins
with other text (`--given`), less and less of it, and none that is not the target's at the end of its budget.
"""

import argparse
import random
import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training import MOST_IN_LAW, WIDEST, divided, fit, law_of, read_texts
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_tokentiming.vocab.pair import Vocabulary

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_pair import Plan, batches, build_model, encode, read_documents, train_target_tokenizer

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
    """Two tokenizers, and how the tokens of one are spelt in those of the other."""

    def __init__(self, target: Any, draft: Any) -> None:
        """Read both."""
        self.target, self.draft = target, draft
        self.target_pieces, self.draft_pieces = (_pieces(tokenizer) for tokenizer in (target, draft))
        self._known: dict[int, list[int]] = {}

    def of(self, target_id: int) -> list[int]:
        """The draft ids of one target token, spelt alone; none for a part of a character."""
        if target_id not in self._known:
            piece = self.target_pieces[target_id].decode(errors="replace")
            self._known[target_id] = [] if "\ufffd" in piece else self.encode(piece)
        return self._known[target_id]

    def encode(self, text: str) -> list[int]:
        """A text in draft ids, special tokens included."""
        draft_ids: list[int] = self.draft(text, add_special_tokens=False).input_ids
        return draft_ids


def _pieces(tokenizer: Any) -> list[bytes]:
    """The bytes of every id; of a special token, those of its text."""
    found = Vocabulary.of(tokenizer.backend_tokenizer).token_bytes
    return [found.special[i].encode() if i in found.special else piece or b"" for i, piece in enumerate(found.pieces)]


@dataclass
class Example:
    """One text in draft tokens.

    Attributes:
        draft_ids: `[n]` int64.
        label_ids: `[n, MOST_IN_LAW]` int64; row `i` is the law of token `i`.
        label_probs: `[n, MOST_IN_LAW]` float32; rows of the prompt are 0.
    """

    draft_ids: torch.Tensor
    label_ids: torch.Tensor
    label_probs: torch.Tensor


def labels(spelt: list[tuple[list[int], float]], prefix: list[int], actual: int) -> dict[int, float]:
    """The law of a draft token inside a target token.

    Args:
        spelt: Draft ids and probability of each of the target's likeliest tokens.
        prefix: Draft ids that are already written of the target's token.
        actual: The draft id that the text has.
    """
    found: dict[int, float] = {}
    for draft_ids, probability in spelt:
        if len(draft_ids) > len(prefix) and draft_ids[: len(prefix)] == prefix:
            found[draft_ids[len(prefix)]] = found.get(draft_ids[len(prefix)], 0.0) + probability
    total = sum(found.values())
    return {draft_id: p / total for draft_id, p in found.items()} if total else {actual: 1.0}


def example(row: dict[str, Any], spelling: Spelling) -> Example | None:
    """A text with the laws of its output, in the draft tokens that a context has; `None` if they spell another text."""
    target_ids, prompt = row["prompt"] + row["output"], len(row["prompt"])
    target_at, draft_at = [0], [0]
    for target_id in target_ids:
        target_at.append(target_at[-1] + len(spelling.target_pieces[target_id]))
    draft_ids = spelling.encode(spelling.target.decode(target_ids))
    for draft_id in draft_ids:
        draft_at.append(draft_at[-1] + len(spelling.draft_pieces[draft_id]))
    if target_at[-1] != draft_at[-1]:
        return None  # It ends inside a character.
    place_of = {byte: place for place, byte in enumerate(draft_at)}
    size = min(len(draft_ids), WIDEST)
    label_ids, label_probs = torch.zeros(size, MOST_IN_LAW, dtype=torch.long), torch.zeros(size, MOST_IN_LAW)
    for i in range(size):
        inside = bisect_right(target_at, draft_at[i]) - 1
        if inside < prompt:
            continue
        begin, end = (place_of.get(byte) for byte in target_at[inside : inside + 2])
        law = {draft_ids[i]: 1.0}
        if begin is not None and draft_at[i + 1] <= target_at[inside + 1]:
            likely = law_of(row, inside - prompt)
            # What the text has is spelt as the text spells it, where both cut it there.
            own = [] if end is None else [(draft_ids[begin:end], likely.pop(target_ids[inside]))]
            spelt = own + [(spelling.of(target_id), p) for target_id, p in likely.items()]
            law = labels(spelt, draft_ids[begin:i], draft_ids[i])
        label_ids[i, : len(law)] = torch.tensor(list(law))
        label_probs[i, : len(law)] = torch.tensor(list(law.values()))
    return Example(torch.tensor(draft_ids[:size]), label_ids, label_probs)


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
    parser.add_argument("--begin", type=Path, help="folder of a draft to go on from, instead of a new one")
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
    if options.begin:
        draft = AutoTokenizer.from_pretrained(options.begin)
        model = LlamaForCausalLM.from_pretrained(options.begin, dtype=torch.float32)
    else:
        texts = [target.decode(row["output"], skip_special_tokens=True) for row in train_rows]
        draft = own_tokenizer(target, texts, options.vocabulary) if options.vocabulary else target
        model = build_model(draft, Plan(len(draft), options.layers, options.width, 0, options.learning_rate))
    spelling = Spelling(target, draft)
    train, held = ([e for row in rows if (e := example(row, spelling))] for rows in (train_rows, held_rows))
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
        """Of the labels `[m, MOST_IN_LAW]`, the labels' probabilities, and the draft's likeliest ids `[m]`."""
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
