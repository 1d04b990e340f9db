"""Teaches a draft model to write what a target model writes; they need not share a vocabulary.

    python examples/teach_draft.py --target DIR --draft DIR --out DIR --text stories.txt code.txt.xz

The target continues the beginnings of documents, sampled at several temperatures, and the draft is trained on
the text that comes out, in its own tokens. Nothing but text goes from one to the other, so that any target
that vLLM runs can teach any draft that transformers trains (sequence-level distillation, Kim and Rush 2016).
A draft needs no such training to be used; it is accepted more often with it.
"""

import argparse
import random
from pathlib import Path

import torch
from train_pair import SEPARATOR, batches, encode, read_documents, train
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPERATURES = (1.0, 0.8, 1.0, 0.6, 1.0, 0.8, 1.0, 0.0)  # In turns: mostly the target's own law, one greedy.


def beginnings(documents: list[str], count: int, rng: random.Random) -> list[str]:
    """Random pieces of text to continue, from 20 to 200 characters long, each from a random place."""
    pieces = []
    while len(pieces) < count:
        document = rng.choice(documents)
        start = rng.choice([0, rng.randrange(len(document))])
        piece = document[start : start + rng.randint(20, 200)].rstrip()
        if piece:
            pieces.append(piece)
    return pieces


def let_write(target: Path, prompts: list[str], length: int, seed: int) -> list[str]:
    """The prompts with the target's continuations; what ended by itself ends with the separator."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(target), max_num_seqs=128, max_model_len=1024, enforce_eager=True, seed=seed)
    sampling = [
        SamplingParams(temperature=TEMPERATURES[i % len(TEMPERATURES)], max_tokens=length) for i in range(len(prompts))
    ]
    outputs = [output.outputs[0] for output in llm.generate(prompts, sampling)]
    return [
        prompt + output.text.rstrip("�") + (SEPARATOR if output.finish_reason == "stop" else "")
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def main(arguments: list[str] | None = None) -> list[float]:
    """Lets the target write, and the draft read; returns the losses of its steps."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--target", type=Path, required=True, help="the teacher's folder")
    parser.add_argument("--draft", type=Path, required=True, help="the learner's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the taught draft")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt or .txt.xz files to begin from")
    parser.add_argument("--prompts", type=int, default=30_000, help="pieces of text that the target continues")
    parser.add_argument("--continuation", type=int, default=200, help="target tokens for each, at most")
    parser.add_argument("--passes", type=float, default=2, help="how often the draft reads all of it")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--written", type=Path, help="file with what the target wrote: read if there, else kept there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="the draft's")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args(arguments)

    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    if options.written and options.written.exists():
        texts = options.written.read_bytes().decode().split("\x00")
    else:
        prompts = beginnings(read_documents(options.text), options.prompts, rng)
        texts = let_write(options.target, prompts, options.continuation, options.seed)
        if options.written:
            options.written.write_bytes("\x00".join(texts).encode())

    tokenizer = AutoTokenizer.from_pretrained(options.draft)
    model = AutoModelForCausalLM.from_pretrained(options.draft, dtype=torch.float32).to(options.device)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pieces = []
    for text in texts:
        ended = text.endswith(SEPARATOR)
        pieces.append(
            torch.tensor(
                ([] if bos is None else [bos]) + encode(tokenizer, text.removesuffix(SEPARATOR)) + [eos] * ended
            )
        )
    stream = torch.cat(pieces)
    steps = max(1, int(options.passes * len(stream)) // (options.batch * options.length))
    print(f"{len(texts):,} texts, {len(stream):,} draft tokens, {steps} steps", flush=True)
    windows = batches(stream, bos, options.batch, options.length)
    losses = train(model, windows, steps, options.learning_rate, options.bf16)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    return losses


if __name__ == "__main__":
    main()
