"""Trains a draft that has the target's own vocabulary: what a pair with unlike vocabularies is held against.

    python benchmarks/same_vocab_draft.py --target examples/models/target --out DIR --text TEXT.txt.xz ...

Its body is the embedded draft's (2 layers, 128 wide); its embedding is larger, since the target's vocabulary is. It is
a reference only as far as it was trained: `trained.json` beside it says on how much, and its bits per byte on
held-out documents beside the embedded draft's tell which of the two knows the language better.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from provenance import provenance
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

from train_pair import Plan, batches, bits_per_byte, build_model, encode, read_documents, train  # noqa: E402

BATCH, LENGTH, HELD_OUT = 16, 256, 100


def main() -> None:
    """Train one draft."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / "examples/models/target", help="whose tokenizer is taken")
    parser.add_argument("--draft", type=Path, default=ROOT / "examples/models/draft", help="to compare bits per byte")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt or .txt.xz files")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="to train on")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    documents = read_documents(options.text)
    random.Random(0).shuffle(documents)
    held_out, documents = documents[:HELD_OUT], documents[HELD_OUT:]
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    pieces, size = [], 0
    for document in documents:
        pieces.append(torch.tensor([tokenizer.eos_token_id, *encode(tokenizer, document)]))
        size += len(pieces[-1])
        if size > 4 * options.tokens:  # Windows seldom overlap then, and encoding more takes time.
            break
    plan = Plan(len(tokenizer), layers=2, width=128, tokens=options.tokens, learning_rate=0.004)
    model = build_model(tokenizer, plan).to(options.device)
    began = time.perf_counter()
    windows = batches(torch.cat(pieces), None, BATCH, LENGTH)
    losses = train(model, windows, plan.tokens // (BATCH * LENGTH), plan.learning_rate, options.bf16)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    other = AutoModelForCausalLM.from_pretrained(options.draft, dtype=torch.float32)
    result = {
        "tokens": plan.tokens,
        "parameters": model.num_parameters(),
        "seconds": time.perf_counter() - began,
        "last_loss": losses[-1],
        "bits_per_byte": bits_per_byte(model.float().cpu(), tokenizer, held_out),
        "bits_per_byte_of_draft": bits_per_byte(other, AutoTokenizer.from_pretrained(options.draft), held_out),
        "provenance": provenance(),
    }
    (options.out / "trained.json").write_text(json.dumps(result, indent=1) + "\n")
    print({name: value for name, value in result.items() if name != "provenance"})


if __name__ == "__main__":
    main()
